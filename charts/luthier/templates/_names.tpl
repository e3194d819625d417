{{- define "luthier.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 63 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "luthier.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "luthier.labels" -}}
{{ include "luthier.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* Takes a value; a list becomes text with commas, a map JSON. Helm reads numbers as floats, and alone would write 1000000 as 1e+06, which
is no quantity. */ -}}
{{- define "luthier.text" -}}
{{ if kindIs "slice" . }}{{ join "," . | quote }}{{ else }}{{ kindIs "string" . | ternary . (toJson .) | quote }}{{ end }}
{{- end }}

{{- /* An environment variable of the operator. Takes (list NAME VALUE); null leaves the operator its default. */ -}}
{{- define "luthier.setting" -}}
{{- $value := index . 1 }}
{{- if not (kindIs "invalid" $value) -}}
- name: {{ index . 0 }}
  value: {{ include "luthier.text" $value }}
{{- end }}
{{- end }}

{{- define "luthier.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "luthier.name" .) "default") }}
{{- end }}

{{- /* An image reference. Takes (dict "image" VALUES "chart" .Chart). */ -}}
{{- define "luthier.image" -}}
{{ .image.repository }}{{ if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default .chart.AppVersion }}{{ end }}
{{- end }}

{{- /* What the operator may do. No secrets, no nodes, no pods/exec, no pods/log: see docs/install.md. */ -}}
{{- define "luthier.rules" -}}
- apiGroups: [luthier.dev]
  resources: [finetunejobs, generatejobs]
  verbs: [get, list, watch, delete]  # get: after a conflict; delete: ttlSecondsAfterFinished
- apiGroups: [luthier.dev]
  resources: [finetunejobs/status, generatejobs/status]
  verbs: [patch]
- apiGroups: [luthier.dev]
  resources: [finetunejobs/finalizers, generatejobs/finalizers]
  verbs: [update]  # owner references that block deletion, where the admission plugin asks for it
- apiGroups: [jobset.x-k8s.io]
  resources: [jobsets]
  verbs: [list, watch, create, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [list, watch, create, delete]
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list, watch]  # why a queued job waits; nothing is read where Kueue is not installed
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [create, get, patch]  # get: whose it is, if the name is taken
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [create, get]  # never changed, never deleted
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch, list]  # list: why a Job has no pods stands only in its Events
{{- end }}

{{- /* Which replica works: in the operator's own namespace, whichever it watches. */ -}}
{{- define "luthier.leaseRules" -}}
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]  # no name can be given here: the API server does not know it yet
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [{{ include "luthier.name" . }}]
  verbs: [get, patch]
{{- end }}
