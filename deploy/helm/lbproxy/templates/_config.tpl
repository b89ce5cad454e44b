{{- /* Made by `make chart`. */ -}}
{{- define "lbproxy.config.conf" -}}
{{- $settings := include "lbproxy.settings" . | fromYaml -}}
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection:
  kubeconfig: /etc/lbproxy/kubeconfig.conf
{{- with omit $settings.kubeProxy "apiVersion" "kind" "clientConnection" }}
{{ toYaml . }}
{{- end }}
---
apiVersion: lbproxy.io/v1alpha1
kind: LbproxyConfiguration
{{- with omit $settings.lbproxy "apiVersion" "kind" }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "lbproxy.kubeconfig.conf" -}}
apiVersion: v1
kind: Config
clusters:
  - name: default
    cluster:
      server: {{ include "lbproxy.apiServer" . | quote }}
      certificate-authority: {{ .Values.apiServer.certificateAuthority | quote }}
users:
  - name: default
    user:
      tokenFile: /var/run/secrets/kubernetes.io/serviceaccount/token
contexts:
  - name: default
    context:
      cluster: default
      user: default
current-context: default
{{- end }}

{{- define "lbproxy.healthzAddress" -}}
{{- $settings := include "lbproxy.settings" . | fromYaml -}}
{{- $settings.kubeProxy.healthzBindAddress | default "0.0.0.0:10256" -}}
{{- end }}

{{- define "lbproxy.metricsAddress" -}}
{{- $settings := include "lbproxy.settings" . | fromYaml -}}
{{- $settings.kubeProxy.metricsBindAddress | default "127.0.0.1:10249" -}}
{{- end }}

{{- define "lbproxy.migrateSettings" -}}
takeOver: when-told
{{- end }}

{{- define "lbproxy.migrateAffinity" -}}
nodeAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    nodeSelectorTerms:
      - matchExpressions:
          - key: lbproxy.io/proxy
            operator: In
            values:
              - both
              - lbproxy
{{- end }}

{{- define "lbproxy.podSecurityLevels" -}}
pod-security.kubernetes.io/enforce=privileged pod-security.kubernetes.io/audit=privileged pod-security.kubernetes.io/warn=privileged
{{- end }}
