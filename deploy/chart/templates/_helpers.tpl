{{- define "ngpt.name" -}}
{{ printf "%s-ngpt" .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "ngpt.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "ngpt.labels" -}}
{{ include "ngpt.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* What runs before the server is told to stop, the server's own limit, and what is left for it to end: in this order. */}}
{{- define "ngpt.gracePeriod" -}}
{{ add .Values.shutdown.drainSeconds .Values.shutdown.exitTimeoutSeconds .Values.shutdown.marginSeconds }}
{{- end }}

{{- define "ngpt.probe" -}}
exec:
  command: [python3, /opt/ngpt/probe.py, --model, {{ .Values.model | quote }}, --timeout, {{ .Values.probe.timeoutSeconds | quote }}]
timeoutSeconds: {{ add .Values.probe.timeoutSeconds 20 }}
{{- end }}

{{/* A pod. Arguments: root, and role: "server", "leader" or "worker". */}}
{{- define "ngpt.pod" -}}
{{- $root := .root }}
{{- with $root }}
metadata:
  labels:
    {{- include "ngpt.labels" . | nindent 4 }}
    ngpt-deploy/role: {{ $.role }}
  {{- if and (ne $.role "worker") (not .Values.monitoring.scrape) }}
  annotations:
    prometheus.io/scrape: "true"
    prometheus.io/port: "8002"
    prometheus.io/path: /metrics
  {{- end }}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ include "ngpt.gracePeriod" . }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    seccompProfile:
      type: RuntimeDefault
  containers:
    - name: triton
      image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      {{- if eq $.role "server" }}
      args:
        - tritonserver
        - --model-repository={{ .Values.models.path }}
        - --disable-auto-complete-config
        - --exit-timeout-secs={{ .Values.shutdown.exitTimeoutSeconds }}
      {{- else }}
      args: [/opt/ngpt/multinode.sh, {{ $.role }}]
      env:
        - name: GPUS_PER_NODE
          value: {{ .Values.gpus | quote }}
        - name: MODELS
          value: {{ .Values.models.path }}
        - name: SSH_PORT
          value: {{ .Values.multiNode.sshPort | quote }}
        - name: EXIT_TIMEOUT
          value: {{ .Values.shutdown.exitTimeoutSeconds | quote }}
      {{- end }}
      {{- if and .Values.shutdown.drainSeconds (ne $.role "worker") }}
      # The server refuses connections from its SIGTERM on. Whoever routes to this pod learns meanwhile that it is going.
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ .Values.shutdown.drainSeconds | quote }}]
      {{- end }}
      ports:
        {{- if eq $.role "worker" }}
        - name: ssh
          containerPort: {{ .Values.multiNode.sshPort }}
        {{- else }}
        - name: http
          containerPort: 8000
        - name: grpc
          containerPort: 8001
        - name: metrics
          containerPort: 8002
        {{- end }}
      {{- if eq $.role "worker" }}
      readinessProbe:
        tcpSocket:
          port: ssh
        periodSeconds: 10
      {{- else }}
      startupProbe:
        {{- include "ngpt.probe" . | nindent 8 }}
        periodSeconds: 10
        failureThreshold: {{ mul .Values.probe.startupMinutes 6 }}
      readinessProbe:
        {{- include "ngpt.probe" . | nindent 8 }}
        periodSeconds: {{ .Values.probe.periodSeconds }}
        failureThreshold: 1
      livenessProbe:
        {{- include "ngpt.probe" . | nindent 8 }}
        periodSeconds: {{ .Values.probe.periodSeconds }}
        failureThreshold: 3
        # Of a server whose model is dead: requests in flight hang, and it would wait for them in vain.
        terminationGracePeriodSeconds: {{ .Values.probe.killAfterSeconds }}
      {{- end }}
      resources:
        {{- $resources := deepCopy .Values.resources }}
        {{- if .Values.gpus }}
        {{- $resources = mergeOverwrite $resources (dict "limits" (dict "nvidia.com/gpu" (toString .Values.gpus))) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      volumeMounts:
        - name: models
          mountPath: {{ .Values.models.path }}
          readOnly: true
        - name: shm
          mountPath: /dev/shm
        - name: tmp
          mountPath: /tmp
        {{- if ne $.role "server" }}
        - name: ssh
          mountPath: /ssh
          readOnly: true
        {{- end }}
  volumes:
    - name: models
      persistentVolumeClaim:
        claimName: {{ .Values.models.claim }}
        readOnly: true
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .Values.sharedMemory }}
    - name: tmp
      emptyDir: {}
    {{- if ne $.role "server" }}
    - name: ssh
      secret:
        secretName: {{ .Values.multiNode.sshSecret }}
        defaultMode: 0440
    {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}
