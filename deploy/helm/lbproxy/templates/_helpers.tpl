{{- define "lbproxy.fullname" -}}
{{- .Values.fullnameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{- define "lbproxy.namespace" -}}
{{- .Values.namespaceOverride | default .Release.Namespace -}}
{{- end }}

{{- define "lbproxy.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (include "lbproxy.fullname" .) -}}
{{- end }}

{{- /* What helm adds to the labels that an object has. Never in a selector: those can not be changed. */ -}}
{{- define "lbproxy.labels" -}}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "lbproxy.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest | quote -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | quote -}}
{{- end -}}
{{- end }}

{{- /* The agent's settings. A trial's stand above them. */ -}}
{{- define "lbproxy.settings" -}}
{{- $kubeProxy := .Values.config.kubeProxy | default dict | deepCopy -}}
{{- $lbproxy := .Values.config.lbproxy | default dict | deepCopy -}}
{{- if .Values.trial.enabled -}}
{{- range $name, $value := .Values.trial.config.kubeProxy -}}
{{- $_ := set $kubeProxy $name $value -}}
{{- end -}}
{{- range $name, $value := .Values.trial.config.lbproxy -}}
{{- $_ := set $lbproxy $name $value -}}
{{- end -}}
{{- end -}}
{{- dict "kubeProxy" $kubeProxy "lbproxy" $lbproxy | toYaml -}}
{{- end }}

{{- define "lbproxy.apiServer" -}}
{{- required "apiServer.server is needed: the API server's address that answers without a service proxy, as in /etc/kubernetes/kubelet.conf of a node, e.g. https://192.0.2.1:6443" .Values.apiServer.server -}}
{{- end }}

{{- define "lbproxy.healthzPort" -}}
{{- include "lbproxy.healthzAddress" . | regexFind "[0-9]+$" -}}
{{- end }}

{{- define "lbproxy.metricsPort" -}}
{{- include "lbproxy.metricsAddress" . | regexFind "[0-9]+$" -}}
{{- end }}

{{- /* "false" where the agent is told to write no Events. */ -}}
{{- define "lbproxy.events" -}}
{{- $settings := include "lbproxy.settings" . | fromYaml -}}
{{- dig "events" true $settings.lbproxy -}}
{{- end }}

{{- define "lbproxy.checksum" -}}
{{- printf "%s%s" (include "lbproxy.config.conf" .) (include "lbproxy.kubeconfig.conf" .) | sha256sum -}}
{{- end }}

{{- /* The name follows the content: agents end when their file changes, so only pods that are replaced may
       get another one. That makes a change roll out node by node, and a bad one stop at the first. */ -}}
{{- define "lbproxy.configName" -}}
{{- printf "%s-%s" (include "lbproxy.fullname" . | trunc 52) (include "lbproxy.checksum" . | trunc 10) -}}
{{- end }}

{{- define "lbproxy.nodeSelector" -}}
{{- $labels := .Values.nodeSelector | default dict | deepCopy -}}
{{- if .Values.trial.enabled -}}
{{- range $name, $value := .Values.trial.nodeSelector -}}
{{- $_ := set $labels $name $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $labels -}}
{{- end }}

{{- define "lbproxy.podSecurityContext" -}}
{{- $context := .Values.podSecurityContext | default dict | deepCopy -}}
{{- if and .Values.hostile.enabled .Values.hostile.appArmorProfile (not .Values.cleanup.enabled) -}}
{{- $_ := set $context "appArmorProfile" .Values.hostile.appArmorProfile -}}
{{- end -}}
{{- toYaml $context -}}
{{- end }}

{{- define "lbproxy.securityContext" -}}
{{- $context := .Values.securityContext | default dict | deepCopy -}}
{{- if .Values.hostile.enabled -}}
{{- $_ := set $context "capabilities" .Values.hostile.capabilities -}}
{{- end -}}
{{- toYaml $context -}}
{{- end }}

{{- define "lbproxy.loadSecurityContext" -}}
{{- $context := .Values.securityContext | default dict | deepCopy -}}
{{- $_ := set $context "capabilities" .Values.hostile.load.capabilities -}}
{{- toYaml $context -}}
{{- end }}

{{- define "lbproxy.checkMonitored" -}}
{{- $address := include "lbproxy.metricsAddress" . -}}
{{- if or (hasPrefix "127." $address) (hasPrefix "[::1]" $address) -}}
{{- printf "monitoring.podMonitor.enabled: Prometheus can not reach %s. Set config.kubeProxy.metricsBindAddress (in a trial: trial.config.kubeProxy.metricsBindAddress) to 0.0.0.0 and the same port, and keep that port to Prometheus by a firewall: it has no authentication" $address | fail -}}
{{- end -}}
{{- end }}
