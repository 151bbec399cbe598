{{/* What follows takes a dict of `root`, the chart's scope, and `component`, coordinator or worker. */}}

{{- define "walsh.selectorLabels" -}}
app.kubernetes.io/name: walsh
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "walsh.labels" -}}
{{ include "walsh.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end }}

{{- define "walsh.name" -}}
{{ .root.Release.Name }}-{{ .component }}
{{- end }}

{{- define "walsh.metadata" -}}
name: {{ include "walsh.name" . }}
labels: {{- include "walsh.labels" . | nindent 2 }}
{{- end }}

{{- define "walsh.image" -}}
{{- $image := .root.Values.image -}}
{{- with $image.registry }}{{ . }}/{{ end -}}
{{ (index .root.Values .component).image }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* A pod's metadata and what both pods' specs have in common. */}}
{{- define "walsh.podMetadata" -}}
labels: {{- include "walsh.labels" . | nindent 2 }}
annotations:
  # A changed flag is a new pod.
  checksum/flags: {{ include "walsh.flags" . | sha256sum }}
{{- end }}

{{- define "walsh.podSpec" -}}
{{- $values := index .root.Values .component -}}
# After SIGTERM: the calls' time, and a margin for last words.
terminationGracePeriodSeconds: {{ add .root.Values.preStopSeconds $values.shutdownTimeoutSeconds 15 }}
automountServiceAccountToken: false
# Kubernetes' variables for Services would begin with WALSH_, as those for flags do.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What both containers have in common. */}}
{{- define "walsh.container" -}}
{{- $values := index .root.Values .component -}}
name: {{ .component }}
image: {{ include "walsh.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
envFrom:
  - configMapRef: {name: {{ include "walsh.name" . }}}
lifecycle:
  preStop:
    sleep: {seconds: {{ .root.Values.preStopSeconds }}}
resources: {{- toYaml $values.resources | nindent 2 }}
{{- end }}

{{- define "walsh.claimSpec" -}}
accessModes: [ReadWriteOnce]
{{- with .className }}
storageClassName: {{ . }}
{{- end }}
resources: {requests: {storage: {{ .size }}}}
{{- end }}

{{/* What a component has of `security`: name of the volume: name of the Secret. */}}
{{- define "walsh.secrets" -}}
{{- $security := .root.Values.security -}}
{{- $secrets := dict "tls" $security.tlsSecret "worker-token" $security.workerTokenSecret -}}
{{- if eq .component "coordinator" }}{{ $_ := set $secrets "api-keys" $security.apiKeysSecret }}{{ end -}}
{{ toYaml $secrets }}
{{- end }}

{{- define "walsh.secretMounts" -}}
{{- range $name, $secret := include "walsh.secrets" . | fromYaml }}
{{- if $secret }}
- {name: {{ $name }}, mountPath: /etc/walsh/{{ $name }}, readOnly: true}
{{- end }}
{{- end }}
{{- end }}

{{- define "walsh.secretVolumes" -}}
{{- range $name, $secret := include "walsh.secrets" . | fromYaml }}
{{- if $secret }}
- name: {{ $name }}
  secret: {secretName: {{ $secret }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- end }}

{{/* Of a gRPC port. */}}
{{- define "walsh.appProtocol" -}}
{{ if .root.Values.security.tlsSecret }}https{{ else }}kubernetes.io/h2c{{ end }}
{{- end }}

{{/* Flags by their environment twins: a ConfigMap's data. */}}
{{- define "walsh.flags" -}}
{{- $values := index .root.Values .component -}}
{{- $flags := dict "WALSH_DATA_DIR" "/var/lib/walsh" "WALSH_HOST" "0.0.0.0" -}}
{{- $_ := set $flags "WALSH_SHUTDOWN_TIMEOUT" (toString $values.shutdownTimeoutSeconds) -}}
{{- $security := .root.Values.security -}}
{{- if $security.tlsSecret -}}
{{- range $flag, $file := dict "CERT" "tls.crt" "KEY" "tls.key" "CA" "ca.crt" -}}
{{- $_ := set $flags (printf "WALSH_TLS_%s" $flag) (printf "/etc/walsh/tls/%s" $file) -}}
{{- end -}}
{{- end -}}
{{- if $security.workerTokenSecret }}{{ $_ := set $flags "WALSH_WORKER_TOKEN_FILE" "/etc/walsh/worker-token/token" }}{{ end -}}
{{- if eq .component "coordinator" -}}
{{- if $security.tlsSecret }}{{ $_ := set $flags "WALSH_TLS_WORKER_NAME" (printf "%s-worker" .root.Release.Name) }}{{ end -}}
{{- with $values.postgres.uri }}{{ $_ := set $flags "WALSH_JOB_STORE" . }}{{ end -}}
{{- if $security.apiKeysSecret }}{{ $_ := set $flags "WALSH_API_KEYS_FILE" "/etc/walsh/api-keys/api-keys.json" }}{{ end -}}
{{- end -}}
{{- if eq .component "worker" -}}
{{- $_ := set $flags "WALSH_COORDINATOR" (printf "%s-coordinator:50052" .root.Release.Name) -}}
{{- with $values.requiredModel }}{{ $_ := set $flags "WALSH_LOAD_MODEL" . }}{{ end -}}
{{- if $values.sources.existingClaim }}{{ $_ := set $flags "WALSH_MODEL_ROOT" "/models" }}{{ end -}}
{{- end -}}
{{- range $name, $value := $values.environment -}}
{{- if hasKey $flags $name }}{{ fail (printf "%s.environment: %s is the chart's own" $.component $name) }}{{ end -}}
{{- $_ := set $flags $name (toString $value) -}}
{{- end -}}
{{ toYaml $flags }}
{{- end }}
