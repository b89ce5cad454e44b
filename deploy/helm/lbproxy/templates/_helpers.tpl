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
{{- $repository := required "image.repository is needed: where the image is that deploy/Dockerfile makes, e.g. registry.example/lbproxy" .Values.image.repository -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $repository .Values.image.digest | quote -}}
{{- else -}}
{{- printf "%s:%s" $repository (.Values.image.tag | default .Chart.AppVersion) | quote -}}
{{- end -}}
{{- end }}

{{- /* The agent's settings. A trial's stand above them, and so does what a migration needs. */ -}}
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
{{- if .Values.migrate.enabled -}}
{{- range $name, $value := include "lbproxy.migrateSettings" . | fromYaml -}}
{{- $_ := set $lbproxy $name $value -}}
{{- end -}}
{{- end -}}
{{- dict "kubeProxy" $kubeProxy "lbproxy" $lbproxy | toYaml -}}
{{- end }}

{{- define "lbproxy.apiServer" -}}
{{- $server := required "apiServer.server is needed: the API server's address that answers without a service proxy, as in /etc/kubernetes/kubelet.conf of a node, e.g. https://192.0.2.1:6443" .Values.apiServer.server -}}
{{- if regexFind "^https?://kubernetes([.]default([.]svc([.][^/]*)?)?)?(:[0-9]+)?(/|$)" $server -}}
{{- printf "apiServer.server: %s is the Service `kubernetes`, which answers only once lbproxy runs. Give the address in /etc/kubernetes/kubelet.conf of a node, e.g. https://192.0.2.1:6443" $server | fail -}}
{{- end -}}
{{- $server -}}
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

{{- /* A migration's choice of nodes beside what is given. Those that clean up go everywhere. */ -}}
{{- define "lbproxy.affinity" -}}
{{- $affinity := .Values.affinity | default dict | deepCopy -}}
{{- if and .Values.migrate.enabled (not .Values.cleanup.enabled) -}}
{{- range $name, $value := include "lbproxy.migrateAffinity" . | fromYaml -}}
{{- $_ := set $affinity $name $value -}}
{{- end -}}
{{- end -}}
{{- if $affinity -}}
{{- toYaml $affinity -}}
{{- end -}}
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

{{- define "lbproxy.checkSettings" -}}
{{- $where := ternary "trial.config.kubeProxy" "config.kubeProxy" .Values.trial.enabled -}}
{{- $healthz := include "lbproxy.healthzAddress" . -}}
{{- if or (hasPrefix "127." $healthz) (hasPrefix "[::1]" $healthz) -}}
{{- printf "%s.healthzBindAddress: the kubelet asks at the node's address and can not reach %s: no pod would become ready. Set it to 0.0.0.0 and the same port" $where $healthz | fail -}}
{{- end -}}
{{- if eq (include "lbproxy.healthzPort" .) (include "lbproxy.metricsPort" .) -}}
{{- printf "%s: healthzBindAddress and metricsBindAddress have the same port, %s" $where (include "lbproxy.healthzPort" .) | fail -}}
{{- end -}}
{{- if and .Values.migrate.enabled .Values.trial.enabled -}}
{{- fail "migrate.enabled: not in a trial, which has other ports and nodes of its own" -}}
{{- end -}}
{{- if and .Values.migrate.enabled (dig "nodeAffinity" "" (.Values.affinity | default dict)) -}}
{{- fail "affinity.nodeAffinity: with migrate.enabled that is by the label which `lbproxy migrate cluster` gives to nodes. Choose among them by nodeSelector" -}}
{{- end -}}
{{- end }}

{{- define "lbproxy.checkMonitored" -}}
{{- $address := include "lbproxy.metricsAddress" . -}}
{{- if or (hasPrefix "127." $address) (hasPrefix "[::1]" $address) -}}
{{- printf "monitoring.podMonitor.enabled: Prometheus can not reach %s. Set config.kubeProxy.metricsBindAddress (in a trial: trial.config.kubeProxy.metricsBindAddress) to 0.0.0.0 and the same port, and keep that port to Prometheus by a firewall: it has no authentication" $address | fail -}}
{{- end -}}
{{- end }}
