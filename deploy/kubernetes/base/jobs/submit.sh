# Creates a RayJob from the suspended one and waits for its end; the exit code is the job's. Run by cronjob.yaml.
# Retrying cannot mend wrong use (2) or a crossed threshold (3).
set -eu
# Of the RayJob: it begins with the Job's, and KubeRay never starts one whose name is longer or begins with a digit.
case "$JOB_NAME" in [!a-z]* | *[!a-z0-9-]*) bad_name=yes ;; esac
if [ -n "${bad_name:-}" ] || [ "${#JOB_NAME}" -gt 41 ]; then
  echo "the name of a Job begins with a letter, and has at most 41 letters, digits and dashes: $JOB_NAME"
  exit 2
fi
# Deleted with the Job that runs this, by the CronJob's history limits: KubeRay deletes only the cluster.
owner="{\"apiVersion\":\"batch/v1\",\"kind\":\"Job\",\"name\":\"$JOB_NAME\",\"uid\":\"$JOB_UID\"}"
metadata="{\"generateName\":\"$JOB_NAME-\",\"labels\":{\"app.kubernetes.io/part-of\":\"btray\"},\"ownerReferences\":[$owner]}"
changes="{\"op\":\"replace\",\"path\":\"/metadata\",\"value\":$metadata},{\"op\":\"replace\",\"path\":\"/spec/suspend\",\"value\":false}"
if [ -n "${RUNS:-}" ]; then # a folder for each Job; one that is created again under its name resumes
  out="{\"name\":\"BTRAY_OUT\",\"value\":\"$RUNS/$JOB_NAME\"}"
  changes="$changes,{\"op\":\"add\",\"path\":\"/spec/rayClusterSpec/headGroupSpec/template/spec/containers/0/env/-\",\"value\":$out}"
fi
for attempt in 1 2 3; do
  kubectl get rayjob btray -o json > /tmp/template.json
  kubectl patch --local -f /tmp/template.json --type json -p "[$changes]" -o json > /tmp/rayjob.json
  job=$(kubectl create -f /tmp/rayjob.json -o name)
  echo "created $job"
  while true; do
    # If the API server is down for a moment, ask again: the RayJob continues meanwhile.
    state=$(kubectl get "$job" --ignore-not-found \
      -o 'jsonpath={.status.jobDeploymentStatus} {.status.jobStatus}') || state=unknown
    case "$state" in
      "Complete SUCCEEDED") exit 0 ;;
      "Complete STOPPED") echo "$job was stopped"; exit 1 ;;
      Complete* | Failed* | ValidationFailed*) break ;;
      "") echo "$job was deleted"; exit 1 ;;
    esac
    sleep 20
  done
  message=$(kubectl get "$job" -o 'jsonpath={.status.message}') || message="Kubernetes gives no reason"
  echo "$job failed: $message"
  case "$state" in ValidationFailed*) exit 2 ;; esac
  case "$message" in # the first words are Ray's; the last lines of the job's log follow
    "Job entrypoint command failed with exit code 2"[,.]*) exit 2 ;;
    "Job entrypoint command failed with exit code 3"[,.]*) exit 3 ;;
  esac
done
exit 1
