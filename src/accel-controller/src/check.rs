//! What is tried for the service before anything depends on it: a Job mounts UFS as all of them
//! do, writes to it and reads it back, and asks registries whether they take the logins.
//!
//! What has gone well counts until somebody who depends on UFS says that it is away: all nodes that
//! can tell, or a task whose Job could not use it. Then a Job tries it anew. Each further one that
//! is begun for such a word, and finds nothing wrong, comes later: there may be nothing wrong but
//! with the nodes.

use crate::conditions;
use crate::job::{self, Settings};
use crate::labels::Ufs;
use crate::login::{self, ACCESS, Log, Whose};
use crate::plan::{left, no_pod, pause, tried_again, waits_for, why};
use crate::resource::{CheckStatus, ImageAcceleration, UfsSpec, UfsVolume};
use accel_oci::Digest;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::{Resource as _, ResourceExt};
use serde_json::json;
use std::time::Duration;

/// The condition that Jobs can use UFS.
pub const UFS_READY: &str = "UfsReady";
/// Its reason when one has.
const TRIED: &str = "Tried";
/// Its reason when one has, and nodes cannot read from it all the same.
const JOBS_ONLY: &str = "JobsOnly";
/// Its reason when one had, and it seems to be away since then.
const DOUBTED: &str = "Doubted";
/// Its reason while no node of the Job can mount UFS.
const NOT_MOUNTED: &str = "NotMounted";
/// Its reason when UFS is there, and cannot be written to or read.
const NOT_USABLE: &str = "NotUsable";
/// Its reason when the Job came to nothing for another cause.
const FAILED: &str = "Failed";
/// On the service: when somebody turned it on again while something was wrong with it. Another
/// value has all of it tried again, and at once.
pub const TRY_AGAIN: &str = "image-accel.io/try-again";
/// The reason of Events that say of a pod that a volume of it cannot be mounted.
pub const FAILED_MOUNT: &str = "FailedMount";

/// How long nobody may have said that UFS is away, after a Job could have tried it for that, until
/// the next one who says so is believed as soon as the first.
const CALM: Duration = Duration::from_secs(600);
/// How soon to look again while a Job is at work.
const SOON: Duration = Duration::from_secs(3);

/// What is observed for the service.
#[derive(Debug)]
pub struct Checking<'a> {
    /// It.
    pub service: &'a ImageAcceleration,
    /// All Jobs that check.
    pub jobs: &'a [Job],
    /// The newest pod of the newest of them.
    pub pod: Option<&'a Pod>,
    /// That pod's log.
    pub log: Option<Log>,
    /// Events that say why that pod has not begun: [`FAILED_MOUNT`].
    pub events: &'a [Event],
    /// What the nodes say of UFS, if they were looked at.
    pub nodes: Option<&'a Ufs>,
    /// The last task that could not use it.
    pub trouble: Option<&'a Trouble>,
    /// What the controller was told.
    pub settings: &'a Settings,
    /// The time.
    pub now: Timestamp,
}

/// That a task's Job could not use UFS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// When it was seen.
    pub at: Timestamp,
    /// Which task, and what its Job says.
    pub what: String,
}

/// Something to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Make this Job.
    Run(Box<Job>),
    /// Remove the Job of this name and its pods.
    Stop(String),
}

/// A condition's status (`True`, `False` or `Unknown`), reason and message.
#[derive(Debug, Clone, PartialEq)]
pub struct Said {
    pub(crate) status: &'static str,
    pub(crate) reason: String,
    pub(crate) message: String,
}

impl Said {
    pub(crate) fn new(status: &'static str, reason: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            reason: reason.to_owned(),
            message: message.into(),
        }
    }

    fn again(said: &Condition) -> Self {
        let status = match said.status.as_str() {
            "True" => "True",
            "False" => "False",
            _ => "Unknown",
        };
        Self::new(status, &said.reason, said.message.clone())
    }
}

/// What is to be said and done then.
#[derive(Debug, Clone, PartialEq)]
pub struct Checked {
    /// Of UFS.
    pub ufs: Said,
    /// Of registries.
    pub access: Said,
    /// For the status.
    pub check: CheckStatus,
    /// To be done when the status is written.
    pub steps: Vec<Step>,
    /// When to look again.
    pub again: Option<Duration>,
}

/// Decides how to go on with trying what the service names: once for all of its settings, again
/// after a while if something is wrong with them, and anew if UFS seems to be away.
pub fn check(observed: &Checking<'_>) -> Checked {
    let service = observed.service;
    let of = fingerprint(service);
    let last = service
        .status
        .as_ref()
        .and_then(|status| status.check.clone());
    let state = last.filter(|check| check.of == of).unwrap_or(CheckStatus {
        of,
        ..CheckStatus::default()
    });
    let (of, failures) = (&state.of, state.failures);
    // The Job of another round may not be gone yet.
    let name = match state.rounds {
        0 => format!("accel-check-{of}-{failures}"),
        round => format!("accel-check-{of}-{round}-{failures}"),
    };
    let check = Check {
        observed,
        place: place(&service.spec.ufs),
        state,
    };
    if check.state.passed {
        return check.goes_on();
    }
    let job = observed.jobs.iter().find(|job| job.name_any() == name);
    match (job, job.and_then(job::end)) {
        (None, _) => check.start(name),
        (Some(job), None) => check.watch(job),
        (Some(_), Some(Ok(()))) => check.passed(Vec::new(), Some(Duration::ZERO)),
        (Some(job), Some(Err((reason, message)))) => check.failed(job, (&reason, &message)),
    }
}

/// Where UFS is, for people.
fn place(ufs: &UfsSpec) -> String {
    match ufs.place() {
        Some(UfsVolume::Claim(name)) => format!("the PersistentVolumeClaim {name}"),
        Some(UfsVolume::Nfs(server, path)) => format!("{server}:{path}"),
        Some(UfsVolume::HostPath(path)) => format!("{path} of the Jobs' nodes"),
        None => "UFS".to_owned(),
    }
}

/// Of the settings that matter: others are another check.
pub fn fingerprint(service: &ImageAcceleration) -> String {
    let spec = &service.spec;
    let text = json!([
        service.uid(),
        spec.ufs,
        spec.registry,
        spec.jobs.user,
        spec.jobs.node_selector,
        service.annotations().get(TRY_AGAIN)
    ]);
    let digest = Digest::of(text.to_string().as_bytes());
    digest.hex()[..16].to_owned()
}

struct Check<'a> {
    observed: &'a Checking<'a>,
    /// Where UFS is, for people.
    place: String,
    state: CheckStatus,
}

impl Check<'_> {
    /// Whether there are registries to be asked.
    fn asks(&self) -> bool {
        let registry = &self.observed.service.spec.registry;
        registry.secret_name.is_some() || registry.push_to.is_some()
    }

    /// Those that go already are in nobody's way: a node may try for minutes to mount what a pod
    /// wants before it lets the pod go.
    fn stop_all(&self) -> Vec<Step> {
        let stays = |job: &&Job| job.metadata.deletion_timestamp.is_none();
        let stay = self.observed.jobs.iter().filter(stays);
        stay.map(|job| Step::Stop(job.name_any())).collect()
    }

    fn said(&self, type_: &str) -> Option<&Condition> {
        let status = self.observed.service.status.as_ref();
        status.and_then(|status| conditions::find(&status.conditions, type_))
    }

    /// What is known of this, if these settings have been tried before: it stays until there is
    /// something else to say.
    fn before(&self, type_: &str) -> Option<&Condition> {
        let tried = self.state.failures > 0 || self.state.rounds > 0;
        let said = self.said(type_).filter(|_| tried);
        said.filter(|said| said.status != "Unknown" || said.reason == DOUBTED)
    }

    /// As long as nothing new is known of UFS.
    fn ufs_as_before(&self, now: &str) -> Said {
        // That the claim has no volume is no result of a Job.
        let of_job = |said: &&Condition| {
            let reasons = [TRIED, JOBS_ONLY, DOUBTED, NOT_MOUNTED, NOT_USABLE, FAILED];
            reasons.contains(&&*said.reason)
        };
        match self.before(UFS_READY).filter(of_job) {
            Some(said) => Said::again(said),
            None => Said::new("Unknown", "Trying", now),
        }
    }

    /// As long as nothing new is known of registries.
    fn access_as_before(&self, now: &str) -> Said {
        if !self.asks() {
            let what = "no Secret is named, and no registry: what a task needs is tried with it";
            return Said::new("True", "NothingToCheck", what);
        }
        match self.before(ACCESS) {
            Some(said) => Said::again(said),
            None => Said::new("Unknown", "Checking", now),
        }
    }

    fn ufs_is_good(&self) -> Said {
        let what = format!("a Job has written to {}, and read it back", self.place);
        match self.observed.nodes {
            Some(Ufs::Unread(said)) => {
                let what = format!("{what}, but no node that can tell reads from it ({said})");
                Said::new("True", JOBS_ONLY, what)
            }
            _ => Said::new("True", TRIED, what),
        }
    }

    /// Who says that UFS is away, although a Job could use it the last time.
    fn doubt(&self) -> Option<String> {
        if let Some(Ufs::Unread(said)) = self.observed.nodes {
            return Some(format!("no node that can tell reads from it ({said})"));
        }
        let since = self.state.finished_at.as_ref();
        let later = |trouble: &&Trouble| since.is_none_or(|Time(since)| trouble.at > *since);
        let trouble = self.observed.trouble.filter(later)?;
        Some(trouble.what.clone())
    }

    /// What is left of a pause since it was tried last.
    fn left(&self, pause: Duration) -> Option<Duration> {
        let Time(last) = self.state.finished_at.as_ref()?;
        left(*last, pause, self.observed.now)
    }

    /// It has passed.
    fn goes_on(mut self) -> Checked {
        let steps = self.stop_all();
        let pause = pause(self.state.doubts);
        match self.doubt() {
            Some(doubt) if self.left(pause).is_none() => return self.doubted(&doubt, steps),
            Some(_) => {}
            // Nothing was said for long, or not even nodes have been looked at.
            None if self.observed.nodes.is_some() && self.left(pause + CALM).is_none() => {
                self.state.doubts = 0;
            }
            None => {}
        }
        let said = self.said(UFS_READY);
        let same = match (self.observed.nodes, said.map(|said| &*said.reason)) {
            // A Job has not tried it since they say so, or they may say it still.
            (Some(Ufs::Unread(_)), Some(TRIED | JOBS_ONLY))
            | (Some(Ufs::Untold) | None, Some(JOBS_ONLY)) => said.map(Said::again),
            _ => None,
        };
        let mut checked = self.passed(steps, None);
        checked.ufs = same.unwrap_or(checked.ufs);
        checked
    }

    /// It has passed, and somebody says that UFS is away: it is tried anew.
    fn doubted(mut self, doubt: &str, steps: Vec<Step>) -> Checked {
        self.state.passed = false;
        self.state.failures = 0;
        self.state.rounds = self.state.rounds.saturating_add(1);
        self.state.doubts = self.state.doubts.saturating_add(1);
        let ufs = match self.said(UFS_READY) {
            // A Job has found it to be there while they said that.
            Some(said) if said.reason == JOBS_ONLY => Said::again(said),
            _ => {
                let what = format!("{} seems to be away: {doubt}; a Job tries it", self.place);
                Said::new("Unknown", DOUBTED, what)
            }
        };
        let access = self.access_as_before("registries are asked once UFS can be used");
        self.say(ufs, access, steps, Some(Duration::ZERO))
    }

    /// A Job has come to an end.
    fn ended(&mut self) {
        self.state.finished_at = Some(Time(self.observed.now));
        self.state.doubted = matches!(self.observed.nodes, Some(Ufs::Unread(_)));
    }

    /// UFS cannot be mounted; `said` by the node that tried.
    fn not_mounted(&self, said: &str) -> Said {
        let advice = match self.observed.service.spec.ufs.place() {
            Some(UfsVolume::Nfs(..)) => {
                "is the server's name right, does it export this to the nodes, and do these have the client (nfs-common)?"
            }
            Some(UfsVolume::HostPath(_)) => {
                "UFS has to be mounted there on each node that Jobs may run on: spec.jobs.nodeSelector"
            }
            _ => "look at its PersistentVolume",
        };
        let what = format!("{} cannot be mounted: {said} ({advice})", self.place);
        Said::new("False", NOT_MOUNTED, what)
    }

    /// What the node says of mounting UFS, as long as it is at that.
    fn node_says(&self) -> Option<Said> {
        let observed = self.observed;
        let is_past = observed.log.is_some() || observed.pod.is_some_and(has_volumes);
        let said = mount_problem(observed.events).filter(|_| !is_past)?;
        Some(self.not_mounted(&said))
    }

    fn not_usable(&self, said: &str) -> Said {
        let user = self.observed.service.spec.jobs.user;
        let what = format!(
            "{} cannot be used: {said} (is it writable for the user {user}, spec.jobs.user?)",
            self.place
        );
        Said::new("False", NOT_USABLE, what)
    }

    /// What the Job has said of UFS, if anything.
    fn tried(&self) -> Option<Said> {
        let output = self.observed.log.as_ref()?.as_ref().ok()?;
        let tried = output.ufs.as_ref()?;
        Some(match tried.usable {
            true => self.ufs_is_good(),
            false => self.not_usable(tried.error.as_deref().unwrap_or_default()),
        })
    }

    fn say(self, ufs: Said, access: Said, steps: Vec<Step>, again: Option<Duration>) -> Checked {
        Checked {
            ufs,
            access,
            check: self.state,
            steps,
            again,
        }
    }

    fn passed(mut self, steps: Vec<Step>, again: Option<Duration>) -> Checked {
        if !self.state.passed {
            self.state.passed = true;
            self.ended();
        }
        let ufs = self.ufs_is_good();
        let access = match self.asks() {
            true => Said::new("True", "Checked", "the registries take the logins"),
            false => self.access_as_before(""),
        };
        self.say(ufs, access, steps, again)
    }

    /// There is no Job.
    fn start(self, name: String) -> Checked {
        let pause = match self.observed.nodes {
            // It was away for them, too, and is back.
            Some(Ufs::Read) if self.state.doubted => pause(1),
            _ => pause(self.state.failures),
        };
        let (steps, again) = match self.left(pause) {
            // The failed Job stays that long for whoever wants to look at it.
            Some(left) => (Vec::new(), left),
            None => {
                let mut steps = self.stop_all();
                if steps.is_empty() {
                    steps.push(Step::Run(Box::new(self.job(name))));
                }
                (steps, SOON)
            }
        };
        let what = "a Job is being started";
        let (ufs, access) = (self.ufs_as_before(what), self.access_as_before(what));
        self.say(ufs, access, steps, Some(again))
    }

    fn job(&self, name: String) -> Job {
        let service = self.observed.service;
        let push_to = service.spec.registry.push_to.as_deref();
        let registry = push_to.and_then(|prefix| prefix.split('/').next());
        let mut job = job::build_check(name, &service.spec, registry, self.observed.settings);
        // It goes with the service.
        job.metadata.owner_references = Some(vec![service.owner_ref(&()).unwrap_or_default()]);
        job
    }

    /// The Job is at work.
    fn watch(self, job: &Job) -> Checked {
        let waits = match self.observed.pod {
            Some(pod) => waits_for(pod),
            None => Some(no_pod(job, self.observed.settings)),
        };
        let ufs = self.tried().unwrap_or_else(|| {
            // The node goes on trying.
            self.node_says()
                .unwrap_or_else(|| self.ufs_as_before(waits.as_deref().unwrap_or("a Job tries it")))
        });
        let access = match (ufs.status, &waits) {
            ("True", _) => self.access_as_before("registries are asked"),
            ("False", _) => self.access_as_before("registries are asked once UFS can be used"),
            (_, Some(waits)) => self.access_as_before(waits),
            (_, None) => self.access_as_before("a Job tries UFS first"),
        };
        self.say(ufs, access, Vec::new(), Some(SOON))
    }

    /// The Job has come to nothing; `end` is what the cluster says of it.
    fn failed(mut self, job: &Job, end: (&str, &str)) -> Checked {
        let (pod, log) = (self.observed.pod, self.observed.log.as_ref());
        self.state.failures = self.state.failures.saturating_add(1);
        self.ended();
        let pause = pause(self.state.failures);
        let tried_again = |mut said: Said| {
            said.message = tried_again(&said.message, job, pause);
            said
        };
        let not_mounted = || {
            let said = self.node_says();
            // With the deadline the pod goes, and in time what was said of it.
            said.or_else(|| {
                let before = self.before(UFS_READY)?;
                let mut said = (before.reason == NOT_MOUNTED).then(|| Said::again(before))?;
                // Which Job it was of is said anew.
                if let Some((message, _)) = said.message.split_once(" (Job ") {
                    said.message = message.to_owned();
                }
                Some(said)
            })
        };
        let ufs = self.tried().or_else(|| match log {
            None => not_mounted(),
            Some(_) => None,
        });
        let ufs = ufs.unwrap_or_else(|| Said::new("False", FAILED, why(pod, end)));
        let (ufs, access) = match ufs.status {
            "True" => {
                let whose = Whose::Service(&self.observed.service.spec);
                let (access, what) = login::failure(pod, log, whose, end);
                let said = Said::new("False", access.unwrap_or("Failed"), what);
                (ufs, tried_again(said))
            }
            _ => {
                let access = self.access_as_before("registries are asked once UFS can be used");
                (tried_again(ufs), access)
            }
        };
        self.say(ufs, access, Vec::new(), Some(pause))
    }
}

/// Whether a pod waits for what comes after its volumes, its image for example.
fn has_volumes(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let containers = status.and_then(|status| status.container_statuses.as_ref());
    let state = containers.and_then(|all| all.first()?.state.as_ref());
    let reason = state.and_then(|state| state.waiting.as_ref()?.reason.as_deref());
    reason.is_some_and(|reason| !["ContainerCreating", "PodInitializing"].contains(&reason))
}

/// Why UFS cannot be mounted for a pod, as its node has said last.
fn mount_problem(events: &[Event]) -> Option<String> {
    let when = |event: &&Event| {
        let last = event.last_timestamp.as_ref().map(|time| time.0);
        last.or_else(|| event.event_time.as_ref().map(|time| time.0))
    };
    let messages = |only: &str| {
        let these = events.iter().filter(|event| {
            let said = event.message.as_deref().unwrap_or_default();
            // A node that is busy may have to try the login's volume again.
            let of_login = said.contains("volume \"login\"") || said.contains("volumes=[login]");
            let of_mount = event.reason.as_deref() == Some(FAILED_MOUNT);
            of_mount && !of_login && said.starts_with(only)
        });
        these.max_by_key(when)
    };
    // That it took too long says less than what was tried.
    let event = messages("MountVolume.").or_else(|| messages(""))?;
    let said = event.message.as_deref().unwrap_or_default();
    // What the mount program says comes last, after its arguments.
    let said = said
        .rsplit_once("\nOutput: ")
        .map_or(said, |(_, output)| output);
    let lines = said.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with("Running scope as unit"));
    Some(lines.collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests;
