//! How it stands with a Job's pod, and what is said of that.

use super::left;
use crate::job::Settings;
use crate::report;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use std::time::Duration;

/// How long a pod may wait for its volumes and its image until it may be UFS that it waits for.
const START_PATIENCE: Duration = Duration::from_secs(120);
/// How `mkfs-accel` ends if it cannot use UFS.
pub(super) const NO_UFS: i32 = 5;

/// What is said of a Job without a pod: because it has just been made, or nobody lets it have one.
pub(crate) fn no_pod(job: &Job, settings: &Settings) -> String {
    format!(
        "its Job has no pod; if that lasts, `kubectl -n {} describe job {}` says why",
        settings.namespace,
        job.name_any()
    )
}

/// How it stands with the pod's one container.
fn state(pod: &Pod) -> Option<&ContainerState> {
    let containers = pod.status.as_ref()?.container_statuses.as_ref()?;
    containers.first()?.state.as_ref()
}

/// When the pod's program began.
pub(super) fn started(pod: &Pod) -> Option<Timestamp> {
    let running = state(pod)?.running.as_ref()?;
    running.started_at.as_ref().map(|time| time.0)
}

/// How the pod's program has failed, if it has.
pub(crate) fn failed(pod: Option<&Pod>) -> Option<&ContainerStateTerminated> {
    let ended = state(pod?)?.terminated.as_ref();
    ended.filter(|ended| ended.exit_code != 0)
}

/// Why a Job has failed, of which the cluster says `end` (reason and message), and what to do.
pub(crate) fn why(pod: Option<&Pod>, end: (&str, &str)) -> String {
    let (reason, message) = end;
    match failed(pod) {
        Some(ended) => in_words(ended, reason),
        None => format!("the Job failed: {reason}: {message}"),
    }
}

/// Why the pod's program does not run yet.
pub(crate) fn waits_for(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let scheduled = status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
    if let Some(condition) = scheduled {
        let why = condition.message.as_deref().unwrap_or_default();
        return Some(format!("no node takes its Job: {why}"));
    }
    let waiting = state(pod)?.waiting.as_ref()?;
    let reason = waiting.reason.as_deref().unwrap_or_default();
    match (reason, &waiting.message) {
        ("ContainerCreating" | "PodInitializing", _) => {
            Some("its Job's pod is being started".to_owned())
        }
        (_, Some(message)) => Some(format!("its Job's pod cannot start: {reason}: {message}")),
        (_, None) => Some(format!("its Job's pod cannot start: {reason}")),
    }
}

/// Whether a pod waits for its volumes, or its image, longer than that takes.
pub(super) fn is_stuck(pod: &Pod, now: Timestamp) -> bool {
    let reason = state(pod).and_then(|state| state.waiting.as_ref()?.reason.as_deref());
    // When its node has taken it.
    let status = pod.status.as_ref();
    let since = status.and_then(|status| status.start_time.as_ref());
    let waits = since.is_some_and(|Time(since)| left(*since, START_PATIENCE, now).is_none());
    waits && reason == Some("ContainerCreating")
}

/// What went wrong, and what to do.
fn in_words(ended: &ContainerStateTerminated, job_reason: &str) -> String {
    let said = report::words(ended.message.as_deref().unwrap_or_default());
    let reason = ended.reason.as_deref().unwrap_or_default();
    let advice = match (job_reason, reason, ended.exit_code) {
        ("DeadlineExceeded", ..) => {
            "it took longer than spec.jobs.deadlineSeconds of the ImageAcceleration allows; what was converted stays"
        }
        (_, "OOMKilled", _) => {
            "it was out of memory: raise spec.jobs.memoryMib of the ImageAcceleration"
        }
        (_, _, 3) => "the image is damaged where it comes from, or what is on UFS is",
        (_, _, 4) => {
            "the image cannot be had: look at its name, and at the login in the Secret that spec.registry.secretName names"
        }
        (_, _, NO_UFS) => {
            "UFS, or where the result goes, cannot be used: is it there, not full, and writable for the user spec.jobs.user?"
        }
        _ => "",
    };
    match (said.is_empty(), advice.is_empty()) {
        (false, false) => format!("{said} ({advice})"),
        (false, true) => said,
        (true, false) => advice.to_owned(),
        (true, true) => format!("the Job's program ended with {} {reason}", ended.exit_code),
    }
}
