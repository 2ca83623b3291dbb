//! What has to be done for a task that is being deleted: what it made goes, but for what
//! others need, and not while nodes use it.

use super::{
    LATER, NO_LOG_YET, NO_UFS, Next, Observed, Plan, SOON, Step, failed, left, waits_for, why,
};
use crate::conditions;
use crate::job;
use crate::login::Secret;
use crate::report::{Output, Removal};
use crate::resource::{ImageAcceleration, Phase, UserStatus};
use k8s_openapi::api::core::v1::ContainerStateTerminated;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use std::time::Duration;

/// How soon to look again whether nodes use it.
const IN_USE_PAUSE: Duration = Duration::from_secs(10);
/// How long to wait after the first failure; twice as long after each further one.
const FIRST_RETRY: Duration = Duration::from_secs(15);
/// The longest of those pauses.
const LAST_RETRY: Duration = Duration::from_secs(600);

/// The condition that nodes use what is to be removed.
pub const IN_USE: &str = "InUse";
/// The condition that all that the task made is gone, and only the task is left.
pub const REMOVED: &str = "Removed";

pub(super) fn delete(observed: &Observed<'_>) -> Plan {
    let mut next = Next::new(observed);
    if !matches!(next.status.phase, Phase::Deleting | Phase::DeleteError) {
        // Failures until now were the conversion's.
        next.status.failures = 0;
        next.status.finished_at = None;
    }
    next.status.progress = None;
    next.delete();
    next.into_plan()
}

fn pause(failures: u32) -> Duration {
    super::doubled(FIRST_RETRY, LAST_RETRY, failures)
}

impl Next<'_> {
    fn delete(&mut self) {
        let uid = self.observed.task.uid().unwrap_or_default();
        let name = job::removal_name(&uid, self.status.failures);
        let job = self.observed.jobs.iter().find(|job| job.name_any() == name);
        if self.is_removed() || job.is_none() {
            return self.removal(name);
        }
        if job.is_some_and(|job| job.metadata.deletion_timestamp.is_some()) {
            // What it said is written down; its pod may be gone already.
            self.again = Some(SOON);
            return;
        }
        match job.map(|job| (job, job::end(job))) {
            Some((job, None)) => {
                self.stop_all_but(Some(job));
                self.notices_stuck();
                // Without the task's Secret there is another Job, with the service's login.
                let what = match self.lend(job) {
                    Some(_) => Some("its Job is being ended".to_owned()),
                    None => self.observed.pod.and_then(waits_for),
                };
                let what = what.unwrap_or_else(|| "is being removed".to_owned());
                if self.status.waits_for_nodes.is_empty() {
                    self.say(Phase::Deleting, &what);
                }
                self.again = Some(SOON);
            }
            Some((job, Some(end))) => {
                let said = match &self.observed.log {
                    Some(Ok(Output {
                        removal: Some(said),
                        ..
                    })) => Some(said.clone()),
                    _ => None,
                };
                match (said, end) {
                    (Some(said), _) if !said.in_use.is_empty() => self.in_use(&said),
                    (Some(said), Ok(())) => self.removed(&said),
                    (_, Err((reason, message))) => self.delete_failed(job, &reason, &message),
                    (None, Ok(())) if self.observed.log.is_some() && self.ended_just_now(job) => {
                        if self.status.waits_for_nodes.is_empty() {
                            self.say(Phase::Deleting, NO_LOG_YET);
                        }
                        self.again = Some(LATER);
                    }
                    // Its pod is gone, or its log: it does no harm to do it again.
                    (None, Ok(())) => self.delete_failed(job, "NoResult", "its result is lost"),
                }
            }
            None => {}
        }
    }

    fn is_removed(&self) -> bool {
        conditions::is_true(&self.status.conditions, REMOVED)
    }

    /// There is no Job that removes.
    fn removal(&mut self, name: String) {
        if let (false, Some(Time(last))) = (self.is_removed(), &self.status.finished_at) {
            let due = match self.status.phase {
                Phase::DeleteError => pause(self.status.failures),
                _ => IN_USE_PAUSE,
            };
            if let Some(left) = left(*last, due, self.observed.now) {
                self.again = Some(left);
                // The failed Job stays that long for whoever wants to look at it.
                if self.status.phase == Phase::Deleting {
                    self.stop_all_but(None);
                }
                return;
            }
        }
        self.stop_all_but(None);
        if !self.steps.is_empty() {
            if !self.is_removed() && self.status.waits_for_nodes.is_empty() {
                self.say(Phase::Deleting, "its Job is being ended");
            }
            self.again = Some(SOON);
            return;
        }
        if self.is_removed() || !self.status.claimed {
            if !self.is_removed() {
                self.say(Phase::Deleting, "it has made nothing");
            }
            self.steps.push(Step::RemoveFinalizer);
            return;
        }
        let Some(service) = self.observed.service else {
            let what = "acceleration is off: what it has made stays on UFS and in the registry";
            self.condition(REMOVED, "False", "Disabled", what);
            self.say(Phase::Deleting, what);
            self.steps.push(Step::RemoveFinalizer);
            return;
        };
        let limit = service.spec.jobs.limit;
        if self.observed.others_at_work >= limit.into() {
            if self.status.waits_for_nodes.is_empty() {
                let what = format!("waits: {limit} other Jobs are under way, the limit");
                self.say(Phase::Deleting, &what);
            }
            self.again = Some(LATER);
            self.waits = true;
            return;
        }
        self.start_removal(name, service);
    }

    fn start_removal(&mut self, name: String, service: &ImageAcceleration) {
        let job = job::build_removal(
            name,
            self.observed.task,
            &service.spec,
            &self.gone(),
            self.observed.secret == Secret::There,
            self.observed.settings,
        );
        self.steps.push(Step::Run(Box::new(job)));
        if self.status.waits_for_nodes.is_empty() {
            self.say(Phase::Deleting, "a Job is being started");
        }
        self.status.finished_at = None;
        self.again = Some(SOON);
    }

    /// Nodes of this cluster that have used it, have been silent for long, and are no more.
    fn gone(&self) -> Vec<String> {
        let Some(nodes) = self.observed.nodes else {
            return Vec::new();
        };
        let cluster = &self.observed.settings.cluster;
        let users = self.status.waits_for_nodes.iter();
        let gone = users
            .filter(|user| user.expired && user.cluster == *cluster && !nodes.contains(&user.node));
        gone.map(|user| user.node.clone()).collect()
    }

    fn in_use(&mut self, said: &Removal) {
        self.status.waits_for_nodes.clone_from(&said.in_use);
        let here = &self.observed.settings.cluster;
        let name = |user: &UserStatus| {
            let mut name = user.node.clone();
            if user.cluster != *here {
                name = format!("{name} of the cluster {}", user.cluster);
            }
            match user.expired {
                true => format!("{name} (perhaps: it has said nothing for long)"),
                false => name,
            }
        };
        let names: Vec<_> = said.in_use.iter().map(name).collect();
        let what = format!("waits: it is in use on {}", names.join(", "));
        self.condition(IN_USE, "True", "NodesUseIt", &what);
        self.say(Phase::Deleting, &what);
        self.status.finished_at = Some(Time(self.observed.now));
        self.stop_all_but(None);
        self.again = Some(IN_USE_PAUSE);
    }

    fn removed(&mut self, said: &Removal) {
        self.free();
        let removed = said.removed.as_ref();
        let layers = removed.map_or(0, |removed| removed.layers);
        let kept = removed.map_or(0, |removed| removed.kept);
        let mut what = format!("{layers} layers are removed, {kept} stay, which others need");
        let reason = match said.warnings.is_empty() {
            true => "Removed",
            false => "RemovedInPart",
        };
        for warning in &said.warnings {
            what = format!("{what}; {warning}");
        }
        self.condition(REMOVED, "True", reason, &what);
        self.say(Phase::Deleting, &what);
        // Once that is written nothing of the Job is needed any more.
        self.again = Some(Duration::ZERO);
    }

    fn free(&mut self) {
        if !self.status.waits_for_nodes.is_empty() {
            self.status.waits_for_nodes.clear();
            self.condition(IN_USE, "False", "NotInUse", "no node uses it");
        }
    }

    fn delete_failed(
        &mut self,
        job: &k8s_openapi::api::batch::v1::Job,
        reason: &str,
        message: &str,
    ) {
        self.free();
        let no_ufs = |ended: &ContainerStateTerminated| ended.exit_code == NO_UFS;
        let ufs_fails =
            reason == "DeadlineExceeded" || failed(self.observed.pod).is_some_and(no_ufs);
        let what = match reason {
            "DeadlineExceeded" => {
                let stuck = self.observed.pod.and_then(waits_for);
                let stuck = stuck.unwrap_or_else(|| message.to_owned());
                format!("UFS does not answer, or the Job cannot reach it: {stuck}")
            }
            _ => why(self.observed.pod, (reason, message)),
        };
        self.ufs_fails = ufs_fails.then(|| what.clone());
        self.status.failures = self.status.failures.saturating_add(1);
        self.status.finished_at = Some(Time(self.observed.now));
        let pause = pause(self.status.failures);
        self.again = Some(pause);
        let what = format!(
            "{what} (Job {}; it is tried again after {} s)",
            job.name_any(),
            pause.as_secs()
        );
        self.say(Phase::DeleteError, &what);
    }
}
