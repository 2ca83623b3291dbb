//! What has to be done for a task, as a pure function of what is observed.

mod delete;
mod pod;

pub use self::delete::{IN_USE, REMOVED};
use self::pod::{NO_UFS, is_stuck, started};
pub(crate) use self::pod::{failed, no_pod, waits_for, why};
use crate::conditions;
use crate::job::{self, Settings};
use crate::login::{self, ACCESS, Log, Secret, Whose};
use crate::reference::{Names, SpecError};
use crate::report::{self, Output, Progress, Report};
use crate::resource::{
    AcceleratedImage, AcceleratedImageStatus, ImageAcceleration, Phase, ProgressStatus,
    SERVICE_NAME,
};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use serde_json::{Value, json};
use std::time::Duration;

/// Keeps a task until its Jobs have ended, and what they made is gone.
pub const FINALIZER: &str = "image-accel.io/controller";

/// How soon to look again while a Job is at work.
const SOON: Duration = Duration::from_secs(3);
/// How soon when something else has to happen first.
const LATER: Duration = Duration::from_secs(10);
/// How long to wait after the first failure; twice as long after each further one.
const FIRST_RETRY: Duration = Duration::from_secs(60);
/// The longest of those pauses.
const LAST_RETRY: Duration = Duration::from_secs(3600);
/// How long the log of a Job that has done its work may be without its result: a kubelet that
/// gets no answer from containerd gives a word about that as the log, and no error.
const LOG_PATIENCE: Duration = Duration::from_secs(300);
const NO_LOG_YET: &str = "the Job has ended, and its node does not give its log yet";

/// What can be seen of a task.
#[derive(Debug)]
pub struct Observed<'a> {
    /// The task.
    pub task: &'a AcceleratedImage,
    /// The service, unless it is turned off.
    pub service: Option<&'a ImageAcceleration>,
    /// The Jobs of this task.
    pub jobs: &'a [Job],
    /// The newest pod of the newest Job.
    pub pod: Option<&'a Pod>,
    /// That pod's log, or why it cannot be read; `None` if there is no pod.
    pub log: Option<Log>,
    /// The Secret that the task names.
    pub secret: Secret,
    /// How many Jobs of other tasks are at work.
    pub others_at_work: usize,
    /// The names of the cluster's nodes, if they have been looked for: they matter for tasks
    /// that are in use while they are being deleted.
    pub nodes: Option<&'a [String]>,
    /// What the controller was told.
    pub settings: &'a Settings,
    /// The time.
    pub now: Timestamp,
}

/// What has to be done: the status is written before anything else.
#[derive(Debug, Default)]
pub struct Plan {
    /// What there is to say, if that is something new.
    pub status: Option<AcceleratedImageStatus>,
    /// To be done in this order.
    pub steps: Vec<Step>,
    /// When to look again, if nothing happens before.
    pub again: Option<Duration>,
    /// Whether it waits because as many Jobs are under way as may be.
    pub waits: bool,
    /// Why its Job cannot use UFS, if it seems so.
    pub ufs_fails: Option<String>,
}

/// Something to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Keep the task from vanishing.
    AddFinalizer,
    /// Let it go.
    RemoveFinalizer,
    /// Make this Job, and what it needs.
    Run(Box<Job>),
    /// Make the Secret for the Job of this name and UID, unless it is there: a copy of the
    /// task's.
    Lend {
        /// Its name, and the Secret's.
        job: String,
        /// With which both go.
        uid: String,
    },
    /// Keep the Job of this name from starting again; it stays to be looked at.
    Hold(String),
    /// Remove the Job of this name and its pods.
    Stop(String),
}

/// A merge patch that gives an object the finalizer, or takes it away; it fails if the object is
/// not any more what was looked at, as others may have changed its finalizers.
pub fn finalizer(of: &ObjectMeta, keep: bool) -> Value {
    let mut finalizers = of.finalizers.clone().unwrap_or_default();
    finalizers.retain(|name| name != FINALIZER);
    if keep {
        finalizers.push(FINALIZER.to_owned());
    }
    json!({"metadata": {"finalizers": finalizers, "resourceVersion": of.resource_version}})
}

/// Whether nothing more has to be done for a task as it is now: what was said of another version
/// of it does not count.
pub fn is_ready(task: &AcceleratedImage) -> bool {
    task.current()
        .is_some_and(|status| status.phase == Phase::Ready)
}

/// Whether what has to be done for a task depends on the service.
pub fn needs_service(task: &AcceleratedImage) -> bool {
    !is_ready(task) || task.metadata.deletion_timestamp.is_some()
}

/// Whether an object that is deleted stays until the controller lets it go.
pub fn is_kept(of: &impl ResourceExt) -> bool {
    of.finalizers().iter().any(|name| name == FINALIZER)
}

/// Decides.
pub fn plan(observed: &Observed<'_>) -> Plan {
    let task = observed.task;
    let kept = is_kept(task);
    if task.metadata.deletion_timestamp.is_some() {
        return match kept {
            true => delete::delete(observed),
            false => Plan::default(),
        };
    }
    if !kept {
        return Plan {
            steps: vec![Step::AddFinalizer],
            ..Plan::default()
        };
    }
    let mut next = Next::new(observed);
    next.decide();
    next.into_plan()
}

/// What is to be said when a step could not be taken, and why: the status that was planned, but
/// for that. Also the name of a Job that cannot go on without it, and is to end, lest it wait
/// for its Secret until its deadline.
pub fn not_taken(
    task: &AcceleratedImage,
    mut status: AcceleratedImageStatus,
    step: &Step,
    why: &str,
    now: Timestamp,
) -> (AcceleratedImageStatus, Option<String>) {
    let (phase, what) = match (task.metadata.deletion_timestamp.is_some(), step) {
        (true, _) => (Phase::DeleteError, "the task cannot be removed"),
        (false, Step::Run(_)) => (Phase::CreateError, "no Job can be made"),
        (false, Step::Hold(_)) => (Phase::CreateError, "its Job cannot be ended"),
        (false, Step::Lend { .. }) => (
            Phase::CreateError,
            "its Job cannot be given the Secret that spec.secretName names",
        ),
        (false, _) => (Phase::Unknown, "the cluster refuses a change"),
    };
    status.phase = phase;
    status.message = format!("{what}: {why}");
    // The next try waits a while from now on.
    status.finished_at = Some(Time(now));
    let stuck = match step {
        Step::Run(job) => job::is_lent(job).then(|| job.name_any()),
        Step::Lend { job, .. } => Some(job.clone()),
        _ => None,
    };
    (status, stuck)
}

/// How long to wait after so many failures.
pub(crate) fn pause(failures: u32) -> Duration {
    doubled(FIRST_RETRY, LAST_RETRY, failures)
}

/// What is left of a pause that has begun at `since`, if anything.
pub(crate) fn left(since: Timestamp, pause: Duration, now: Timestamp) -> Option<Duration> {
    let waited = Duration::try_from(now.duration_since(since)).unwrap_or_default();
    let left = pause.checked_sub(waited);
    left.filter(|left| !left.is_zero())
}

/// Says of a Job that came to nothing because of `what` which one it is, and that there is
/// another one after the pause.
pub(crate) fn tried_again(what: &str, job: &Job, pause: Duration) -> String {
    let (job, minutes) = (job.name_any(), pause.as_secs() / 60);
    format!("{what} (Job {job}; it is tried again after {minutes} minutes)")
}

fn doubled(first: Duration, last: Duration, failures: u32) -> Duration {
    let times = 1_u32.checked_shl(failures.saturating_sub(1));
    times
        .and_then(|times| first.checked_mul(times))
        .map_or(last, |pause| pause.min(last))
}

/// A plan while it is made.
struct Next<'a> {
    observed: &'a Observed<'a>,
    generation: i64,
    status: AcceleratedImageStatus,
    steps: Vec<Step>,
    again: Option<Duration>,
    waits: bool,
    ufs_fails: Option<String>,
}

impl<'a> Next<'a> {
    fn new(observed: &'a Observed<'a>) -> Self {
        let generation = observed.task.metadata.generation.unwrap_or_default();
        let last = observed.task.status.clone().unwrap_or_default();
        let deleted = observed.task.metadata.deletion_timestamp.is_some();
        let status = if last.observed_generation == generation || deleted {
            // Deletion is another version, too, but of the same images.
            AcceleratedImageStatus {
                observed_generation: generation,
                ..last
            }
        } else {
            // Of another version of the task; when conditions changed, it knows.
            AcceleratedImageStatus {
                conditions: last.conditions,
                claimed: last.claimed,
                observed_generation: generation,
                ..AcceleratedImageStatus::default()
            }
        };
        Self {
            observed,
            generation,
            status,
            steps: Vec::new(),
            again: None,
            waits: false,
            ufs_fails: None,
        }
    }

    fn into_plan(self) -> Plan {
        let changed = self.observed.task.status.as_ref() != Some(&self.status);
        Plan {
            status: changed.then_some(self.status),
            steps: self.steps,
            again: self.again,
            waits: self.waits,
            ufs_fails: self.ufs_fails,
        }
    }

    /// A Job is at work, or should be.
    fn notices_stuck(&mut self) {
        self.ufs_fails = self
            .observed
            .pod
            .filter(|pod| is_stuck(pod, self.observed.now))
            .map(|_| "its pod has been waiting for its volumes for minutes".to_owned());
    }

    fn decide(&mut self) {
        if self.status.phase == Phase::Ready {
            // What the Jobs had to say is in the status.
            self.stop_all_but(None);
            return;
        }
        let Some(service) = self.observed.service else {
            let what = format!(
                "waits: acceleration is off, there is no ImageAcceleration called {SERVICE_NAME}"
            );
            self.accepted(false, "Disabled", &what);
            self.say(Phase::Creating, &what);
            self.status.progress = None;
            self.stop_all_but(None);
            return;
        };
        let names = match Names::of(&self.observed.task.spec, &service.spec.registry) {
            Ok(names) => names,
            Err(error) => return self.refuse(&error),
        };
        self.accepted(true, "Valid", "it can be worked on");
        names.image().clone_into(&mut self.status.target);
        let uid = self.observed.task.uid().unwrap_or_default();
        let name = job::name(&uid, self.generation, self.status.failures);
        let job = self.observed.jobs.iter().find(|job| job.name_any() == name);
        match (job, job.and_then(job::end)) {
            (None, _) => self.start(name, &names, service),
            // Why it had to end is told already, or somebody wanted it.
            (Some(job), None) if job.metadata.deletion_timestamp.is_some() => {
                self.again = Some(SOON);
            }
            (Some(job), None) => self.watch(job, service),
            (Some(job), Some(Ok(()))) => self.finish(job),
            (Some(job), Some(Err((reason, message)))) => {
                self.fail(job, service, &reason, &message);
            }
        }
    }

    fn refuse(&mut self, error: &SpecError) {
        let what = error.to_string();
        self.accepted(false, "Invalid", &what);
        self.say(Phase::CreateError, &what);
        self.status.progress = None;
        self.stop_all_but(None);
    }

    /// There is no Job.
    fn start(&mut self, name: String, names: &Names, service: &ImageAcceleration) {
        let now = self.observed.now;
        if let Some(Time(failed)) = self.status.finished_at
            && let Some(left) = left(failed, pause(self.status.failures), now)
        {
            // The failed Job stays that long for whoever wants to look at it.
            self.again = Some(left);
            self.hold();
            return;
        }
        self.stop_all_but(None);
        if !self.steps.is_empty() {
            // Of an earlier version, or a failed one: one of a task's at a time.
            self.say(Phase::Creating, "waits until an earlier Job has ended");
            self.again = Some(SOON);
            return;
        }
        if let Some((reason, what)) = self.observed.secret.problem(self.observed.task) {
            self.condition(ACCESS, "False", reason, &what);
            self.say(Phase::CreateError, &what);
            self.again = Some(FIRST_RETRY);
            return;
        }
        let limit = service.spec.jobs.limit;
        if self.observed.others_at_work >= limit.into() {
            let what = format!("waits: {limit} other Jobs are under way, the limit");
            self.say(Phase::Creating, &what);
            self.again = Some(LATER);
            self.waits = true;
            return;
        }
        self.access_is_unknown();
        let job = job::build(
            name,
            self.observed.task,
            &service.spec,
            names,
            self.observed.settings,
        );
        self.steps.push(Step::Run(Box::new(job)));
        self.status.claimed = true;
        self.say(Phase::Creating, "a Job is being started");
        self.status.started_at.get_or_insert(Time(now));
        self.status.finished_at = None;
        self.status.progress = None;
        self.again = Some(SOON);
    }

    /// No Job of the task goes on while it waits.
    fn hold(&mut self) {
        let at_work = self.observed.jobs.iter().filter(|job| {
            let goes = job.metadata.deletion_timestamp.is_some();
            job::is_at_work(job) && !goes
        });
        let hold = at_work.map(|job| Step::Hold(job.name_any()));
        self.steps.extend(hold);
    }

    /// What was said of another version of the task is not said of this one.
    fn access_is_unknown(&mut self) {
        let said = conditions::find(&self.status.conditions, ACCESS);
        let same = |said: &Condition| said.observed_generation == Some(self.generation);
        // That the task's own Secret could not be had is over, too.
        let is_there = self.observed.secret == Secret::There;
        let without = |said: &Condition| {
            is_there && ["NoSecret", "SecretNotReadable"].contains(&&*said.reason)
        };
        if !said.is_some_and(|said| same(said) && !without(said)) {
            let what = "is tried before anything is converted";
            self.condition(ACCESS, "Unknown", "Checking", what);
        }
    }

    fn access_is_good(&mut self) {
        let what = "the source can be pulled, and the target pushed to";
        self.condition(ACCESS, "True", "Checked", what);
    }

    /// Sees to it that a Job that has not begun can have its Secret. If there is none any more
    /// the Job ends, as it would wait for it until its deadline and keep others from the room
    /// that it takes; why there is none.
    fn lend(&mut self, job: &Job) -> Option<String> {
        if !job::is_lent(job) || self.observed.log.is_some() {
            return None;
        }
        if let Some((reason, what)) = self.observed.secret.problem(self.observed.task) {
            self.condition(ACCESS, "False", reason, &what);
            self.steps.push(Step::Stop(job.name_any()));
            return Some(what);
        }
        let (job, uid) = (job.name_any(), job.uid()?);
        self.steps.push(Step::Lend { job, uid });
        None
    }

    /// A Job is at work.
    fn watch(&mut self, job: &Job, service: &ImageAcceleration) {
        self.again = Some(SOON);
        self.stop_all_but(Some(job));
        if let Some(what) = self.lend(job) {
            self.say(Phase::CreateError, &what);
            return;
        }
        self.notices_stuck();
        let mut passes = None;
        if let Some(refusal) = login::refusal(self.observed.pod, self.observed.log.as_ref()) {
            let whose = Whose::of(self.observed.task, &service.spec);
            let (reason, what) = login::refused(refusal, whose);
            self.condition(ACCESS, "False", reason, &what);
            if refusal.0.problem.lasts() {
                // Trying it as often as Jobs may be tried changes nothing, and registries lock
                // out who comes with a wrong password again and again.
                self.has_failed(job, &what);
                self.steps.push(Step::Hold(job.name_any()));
                return;
            }
            passes = Some(format!("{what}; its Job tries again"));
        } else if let Some(Ok(output)) = &self.observed.log
            && (output.checked || output.progress.is_some())
        {
            self.access_is_good();
        }
        if let Some(Ok(Output {
            progress: Some(progress),
            ..
        })) = &self.observed.log
        {
            let since = self.observed.pod.and_then(started);
            let taken = since.map(|since| self.observed.now.duration_since(since));
            let taken = taken.and_then(|taken| Duration::try_from(taken).ok());
            let shown = shown(progress, taken.unwrap_or_default());
            // The rate alone is no reason to write a status every time.
            let last = self.status.progress.as_ref();
            if last
                .is_none_or(|last| last.text != shown.text || last.bytes_done != shown.bytes_done)
            {
                self.status.progress = Some(shown);
            }
        }
        let what = match self.observed.pod {
            Some(pod) => waits_for(pod).unwrap_or_else(|| "is being converted".to_owned()),
            None => no_pod(job, self.observed.settings),
        };
        self.say(Phase::Creating, &passes.unwrap_or(what));
    }

    /// The Job has done its work.
    fn finish(&mut self, job: &Job) {
        match &self.observed.log {
            Some(Ok(Output {
                report: Some(report),
                ..
            })) => {
                self.ready(report);
                // Once that is written nothing of the Job is needed any more.
                self.again = Some(Duration::ZERO);
            }
            Some(Err(problem)) => {
                let what = format!("the Job has ended, but its result cannot be read: {problem}");
                self.say(Phase::Unknown, &what);
                self.again = Some(LATER);
            }
            Some(Ok(_)) if self.ended_just_now(job) => {
                self.say(Phase::Creating, NO_LOG_YET);
                self.again = Some(LATER);
            }
            // The pod is gone, or its log.
            Some(Ok(_)) | None => {
                let pause = self.count_failure();
                let what = format!(
                    "the Job's result is lost with its pod: it runs again after {} minutes, and takes what is on UFS already",
                    pause.as_secs() / 60
                );
                self.say(Phase::Creating, &what);
            }
        }
    }

    /// Whether the Job has ended so short a time ago that its log may come yet.
    fn ended_just_now(&self, job: &Job) -> bool {
        let status = job.status.as_ref();
        let ended = status.and_then(|status| status.completion_time.as_ref());
        ended.is_some_and(|Time(ended)| left(*ended, LOG_PATIENCE, self.observed.now).is_some())
    }

    fn ready(&mut self, report: &Report) {
        let sizes = report.sizes();
        let status = &mut self.status;
        status.source_digest = Some(report.manifest.clone());
        let pushed = report.accelerated.first();
        status.target_digest = pushed.map(|pushed| pushed.manifest.clone());
        status.layers = Some(sizes.layers);
        status.original_bytes = Some(sizes.original);
        status.stored_bytes = Some(sizes.stored);
        status.shared_bytes = Some(sizes.shared);
        status.stored = report::bytes(sizes.stored);
        status.chain_ids = report.chain_ids();
        status.progress = None;
        status.finished_at = Some(Time(self.observed.now));
        self.access_is_good();
        self.say(Phase::Ready, "nodes can start it without downloading it");
    }

    fn fail(&mut self, job: &Job, service: &ImageAcceleration, reason: &str, message: &str) {
        let whose = Whose::of(self.observed.task, &service.spec);
        let (pod, log) = (self.observed.pod, self.observed.log.as_ref());
        let (access, what) = login::failure(pod, log, whose, (reason, message));
        if failed(pod).is_some_and(|ended| ended.exit_code == NO_UFS) {
            self.ufs_fails = Some(what.clone());
        }
        if let Some(access) = access {
            self.condition(ACCESS, "False", access, &what);
        }
        self.has_failed(job, &what);
    }

    /// The Job has come to nothing, because of `what`.
    fn has_failed(&mut self, job: &Job, what: &str) {
        let pause = self.count_failure();
        self.say(Phase::CreateError, &tried_again(what, job, pause));
    }

    /// Counts a Job that came to nothing; how long to wait before the next one.
    fn count_failure(&mut self) -> Duration {
        self.status.failures = self.status.failures.saturating_add(1);
        self.status.progress = None;
        self.status.finished_at = Some(Time(self.observed.now));
        let pause = pause(self.status.failures);
        self.again = Some(pause);
        pause
    }

    fn stop_all_but(&mut self, keep: Option<&Job>) {
        let keep = keep.map(ResourceExt::name_any);
        for job in self.observed.jobs {
            if Some(job.name_any()) != keep {
                self.steps.push(Step::Stop(job.name_any()));
            }
        }
    }

    /// Sets the phase, and the condition that goes with it.
    fn say(&mut self, phase: Phase, message: &str) {
        self.status.phase = phase;
        message.clone_into(&mut self.status.message);
        let ready = match phase {
            Phase::Ready => "True",
            Phase::Unknown => "Unknown",
            _ => "False",
        };
        self.condition("Ready", ready, &format!("{phase:?}"), message);
    }

    fn accepted(&mut self, yes: bool, reason: &str, message: &str) {
        let yes = if yes { "True" } else { "False" };
        self.condition("Accepted", yes, reason, message);
    }

    fn condition(&mut self, kind: &str, status: &str, reason: &str, message: &str) {
        conditions::set(
            &mut self.status.conditions,
            [kind, status, reason, message],
            Some(self.generation),
            self.observed.now,
        );
    }
}

fn shown(progress: &Progress, taken: Duration) -> ProgressStatus {
    let per_second = progress
        .bytes_done
        .checked_div(taken.as_secs())
        .unwrap_or_default();
    let mut text = format!("{}/{} layers", progress.layers_done, progress.layers);
    if let Some(percent) = (progress.bytes_done.saturating_mul(100)).checked_div(progress.bytes) {
        text = format!("{text}, {percent} % of {}", report::bytes(progress.bytes));
    }
    ProgressStatus {
        layers: progress.layers,
        layers_done: progress.layers_done,
        bytes: progress.bytes,
        bytes_done: progress.bytes_done,
        bytes_per_second: per_second,
        text,
    }
}

#[cfg(test)]
mod tests;
