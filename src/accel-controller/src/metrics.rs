//! What the controller tells Prometheus. `ARCHITECTURE.md` has the list.
//!
//! Only the controller that leads knows anything; of another one there is that it does not
//! lead. Counters begin when a process does; what is the case is told as it was seen last.

use crate::conditions;
use crate::login::ACCESS;
use crate::plan::REMOVED;
use crate::resource::{AcceleratedImage, AcceleratedImageStatus, Phase};
use accel_metrics::{Exposition, Histogram};
use kube::runtime::reflector::Store;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// The longest time of each bucket of durations, in microseconds.
const BOUNDS: [u64; 10] = [
    1_000_000,
    5_000_000,
    15_000_000,
    30_000_000,
    60_000_000,
    180_000_000,
    600_000_000,
    1_800_000_000,
    3_600_000_000,
    21_600_000_000,
];

const PHASES: [Phase; 6] = [
    Phase::Creating,
    Phase::Ready,
    Phase::CreateError,
    Phase::Deleting,
    Phase::DeleteError,
    Phase::Unknown,
];

/// What is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    counts: Mutex<Counts>,
    /// The tasks that there are, once this process leads.
    tasks: OnceLock<Store<AcceleratedImage>>,
}

#[derive(Debug, Default)]
struct Counts {
    leads: bool,
    jobs_at_work: usize,
    /// UIDs of tasks that wait for the limit.
    queue: HashSet<String>,
    nodes: (u32, u32),
    jobs_started: u64,
    converted: u64,
    failed: u64,
    removed: u64,
    removals_failed: u64,
    converted_bytes: u64,
    written_bytes: u64,
    conversion: Times,
    /// By the condition's reason.
    refused: BTreeMap<String, u64>,
    looks: u64,
    errors: u64,
}

#[derive(Debug, Default)]
struct Times {
    counts: [u64; BOUNDS.len() + 1],
    nanoseconds: u64,
}

impl Times {
    fn record(&mut self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.partition_point(|bound| *bound < micros);
        self.counts[bucket] += 1;
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds = self.nanoseconds.saturating_add(nanoseconds);
    }
}

impl Metrics {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This process leads from now on.
    pub fn leads(&self) {
        self.counts().leads = true;
    }

    /// These are the tasks.
    pub fn watch(&self, tasks: Store<AcceleratedImage>) {
        // There is one loop in a process.
        let _ = self.tasks.set(tasks);
    }

    /// All of it as text.
    pub fn text(&self) -> String {
        let tasks = self.tasks.get().map(Store::state).unwrap_or_default();
        self.render(tasks.iter().map(|task| &**task))
    }

    /// A task was looked at, and found to wait for the limit, or not; so many Jobs were at
    /// work then.
    pub fn looked(&self, uid: &str, waits: bool, jobs_at_work: usize) {
        let mut counts = self.counts();
        counts.looks += 1;
        counts.jobs_at_work = jobs_at_work;
        if waits {
            counts.queue.insert(uid.to_owned());
        } else {
            counts.queue.remove(uid);
        }
    }

    /// A Job was made.
    pub fn job_started(&self) {
        let mut counts = self.counts();
        counts.jobs_started += 1;
        // Until the next look.
        counts.jobs_at_work += 1;
    }

    /// The cluster refused something, or did not answer.
    pub fn error(&self) {
        self.counts().errors += 1;
    }

    /// Nodes that can serve, and those that are meant.
    pub fn nodes(&self, ready: u32, all: u32) {
        self.counts().nodes = (ready, all);
    }

    /// What is said of a task has changed.
    pub fn told(&self, before: &AcceleratedImageStatus, now: &AcceleratedImageStatus) {
        let mut counts = self.counts();
        let is_new = |phase: Phase| {
            let other =
                before.phase != phase || before.observed_generation != now.observed_generation;
            now.phase == phase && other
        };
        let failed_again = now.failures > before.failures;
        if is_new(Phase::Ready) {
            counts.converted += 1;
            counts.converted_bytes += now.original_bytes.unwrap_or_default();
            counts.written_bytes += now.stored_bytes.unwrap_or_default();
            if let (Some(from), Some(to)) = (&now.started_at, &now.finished_at) {
                let took = to.0.duration_since(from.0);
                counts
                    .conversion
                    .record(took.try_into().unwrap_or_default());
            }
        }
        if failed_again {
            match now.phase {
                Phase::DeleteError => counts.removals_failed += 1,
                _ => counts.failed += 1,
            }
        }
        let (before, now) = (&before.conditions, &now.conditions);
        if conditions::is_true(now, REMOVED) && !conditions::is_true(before, REMOVED) {
            counts.removed += 1;
        }
        let access = conditions::find(now, ACCESS);
        if let Some(refused) = access.filter(|access| access.status == "False")
            && (failed_again || conditions::find(before, ACCESS) != access)
        {
            *counts.refused.entry(refused.reason.clone()).or_default() += 1;
        }
    }

    fn render<'a>(&self, tasks: impl IntoIterator<Item = &'a AcceleratedImage>) -> String {
        let mut by_phase = HashMap::new();
        let (mut stored_bytes, mut uids) = (0, HashSet::new());
        for task in tasks {
            let status = task.status.as_ref();
            let phase = status.map_or_else(Phase::default, |status| status.phase);
            *by_phase.entry(phase).or_insert(0_u64) += 1;
            if phase == Phase::Ready {
                let bytes = status.and_then(|status| status.stored_bytes);
                stored_bytes += bytes.unwrap_or_default();
            }
            uids.extend(task.metadata.uid.clone());
        }
        let mut counts = self.counts();
        // Those that were deleted.
        counts.queue.retain(|uid| uids.contains(uid));
        let mut text = Exposition::default();
        text.gauge(
            "accel_controller_build_info",
            "Always 1; the version is a label.",
            &[("version", env!("CARGO_PKG_VERSION"))],
            1,
        );
        text.gauge(
            "accel_controller_leads",
            "1 if this controller works, 0 if it waits; then nothing else is known.",
            &[],
            u8::from(counts.leads),
        );
        if !counts.leads {
            return text.finish();
        }
        for phase in PHASES {
            let name = format!("{phase:?}");
            text.gauge(
                "accel_controller_tasks",
                "Tasks by phase.",
                &[("phase", name.as_str())],
                by_phase.get(&phase).copied().unwrap_or_default(),
            );
        }
        counts.write(&mut text, stored_bytes);
        text.finish()
    }
}

impl Counts {
    fn write(&self, text: &mut Exposition, stored_bytes: u64) {
        for (name, help, value) in [
            (
                "accel_controller_queue",
                "Tasks that wait because as many Jobs are under way as may be.",
                self.queue.len() as u64,
            ),
            (
                "accel_controller_jobs_at_work",
                "Jobs of tasks that have not ended.",
                self.jobs_at_work as u64,
            ),
            (
                "accel_controller_nodes",
                "Nodes that are meant.",
                self.nodes.1.into(),
            ),
            (
                "accel_controller_nodes_ready",
                "Those of them that can start accelerated images.",
                self.nodes.0.into(),
            ),
            (
                "accel_controller_stored_bytes",
                "What the layers of all Ready tasks take on UFS; shared ones count for each.",
                stored_bytes,
            ),
        ] {
            text.gauge(name, help, &[], value);
        }
        for (result, value) in [("ready", self.converted), ("failed", self.failed)] {
            text.counter(
                "accel_controller_conversions_total",
                "Conversions that have ended.",
                &[("result", result)],
                value,
            );
        }
        for (result, value) in [("removed", self.removed), ("failed", self.removals_failed)] {
            text.counter(
                "accel_controller_removals_total",
                "Removals that have ended; one that waits for nodes is none.",
                &[("result", result)],
                value,
            );
        }
        for (name, help, value) in [
            (
                "accel_controller_jobs_started_total",
                "Jobs that were made.",
                self.jobs_started,
            ),
            (
                "accel_controller_converted_bytes_total",
                "Size in the registry of the images that became Ready.",
                self.converted_bytes,
            ),
            (
                "accel_controller_written_bytes_total",
                "What those take on UFS, with layers that were there before.",
                self.written_bytes,
            ),
            (
                "accel_controller_looks_total",
                "How often a task was looked at.",
                self.looks,
            ),
            (
                "accel_controller_errors_total",
                "How often the cluster refused something, or did not answer.",
                self.errors,
            ),
        ] {
            text.counter(name, help, &[], value);
        }
        for (reason, value) in &self.refused {
            text.counter(
                "accel_controller_refusals_total",
                "How often a registry did not do what a task needs, or its Secret could not be had.",
                &[("reason", reason.as_str())],
                *value,
            );
        }
        text.histogram(
            "accel_controller_conversion_seconds",
            "From a task's first Job until it was Ready.",
            &[],
            Histogram {
                bounds: &BOUNDS,
                counts: &self.conversion.counts,
                nanoseconds: self.conversion.nanoseconds,
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
    use k8s_openapi::jiff::Timestamp;
    use std::collections::BTreeSet;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    fn task(uid: &str, status: &AcceleratedImageStatus) -> AcceleratedImage {
        let spec = serde_json::from_value(serde_json::json!({"source": "h/a"})).unwrap();
        let mut task = AcceleratedImage::new(uid, spec);
        task.metadata.uid = Some(uid.to_owned());
        task.status = Some(status.clone());
        task
    }

    fn says(type_: &str, is: &str, reason: &str) -> Condition {
        Condition {
            type_: type_.to_owned(),
            status: is.to_owned(),
            reason: reason.to_owned(),
            message: String::new(),
            observed_generation: None,
            last_transition_time: at(0),
        }
    }

    #[test]
    fn what_happens_moves_what_is_counted() {
        let metrics = Metrics::default();
        assert!(metrics.render([]).contains("\naccel_controller_leads 0\n"));
        assert!(!metrics.render([]).contains("accel_controller_tasks"));
        metrics.leads();
        let creating = AcceleratedImageStatus {
            phase: Phase::Creating,
            observed_generation: 1,
            started_at: Some(at(10)),
            ..AcceleratedImageStatus::default()
        };
        let failed = AcceleratedImageStatus {
            phase: Phase::CreateError,
            failures: 1,
            conditions: vec![says("RegistryAccess", "False", "Unauthorized")],
            ..creating.clone()
        };
        let ready = AcceleratedImageStatus {
            phase: Phase::Ready,
            original_bytes: Some(100),
            stored_bytes: Some(300),
            finished_at: Some(at(30)),
            ..creating.clone()
        };
        let deleting = AcceleratedImageStatus {
            phase: Phase::Deleting,
            failures: 0,
            ..ready.clone()
        };
        let not_deleted = AcceleratedImageStatus {
            phase: Phase::DeleteError,
            failures: 1,
            ..deleting.clone()
        };
        let removed = AcceleratedImageStatus {
            conditions: vec![says("Removed", "True", "Removed")],
            ..deleting.clone()
        };
        metrics.looked("a", true, 3);
        metrics.looked("gone", true, 3);
        metrics.job_started();
        metrics.error();
        metrics.nodes(1, 2);
        let mut last = AcceleratedImageStatus::default();
        for now in [
            &creating,
            &failed,
            &failed,
            &ready,
            &ready,
            &deleting,
            &not_deleted,
            &removed,
        ] {
            metrics.told(&last, now);
            last = now.clone();
        }
        let (one, two) = (task("a", &creating), task("b", &ready));
        let text = metrics.render([&one, &two]);
        for line in [
            "accel_controller_leads 1",
            "accel_controller_tasks{phase=\"Creating\"} 1",
            "accel_controller_tasks{phase=\"Ready\"} 1",
            "accel_controller_tasks{phase=\"Unknown\"} 0",
            "accel_controller_queue 1",
            "accel_controller_jobs_at_work 4",
            "accel_controller_nodes 2",
            "accel_controller_nodes_ready 1",
            "accel_controller_stored_bytes 300",
            "accel_controller_conversions_total{result=\"ready\"} 1",
            "accel_controller_conversions_total{result=\"failed\"} 1",
            "accel_controller_removals_total{result=\"removed\"} 1",
            "accel_controller_removals_total{result=\"failed\"} 1",
            "accel_controller_jobs_started_total 1",
            "accel_controller_converted_bytes_total 100",
            "accel_controller_written_bytes_total 300",
            "accel_controller_looks_total 2",
            "accel_controller_errors_total 1",
            "accel_controller_refusals_total{reason=\"Unauthorized\"} 1",
            "accel_controller_conversion_seconds_bucket{le=\"15\"} 0",
            "accel_controller_conversion_seconds_bucket{le=\"30\"} 1",
            "accel_controller_conversion_seconds_sum 20",
            "accel_controller_conversion_seconds_count 1",
        ] {
            assert!(
                text.lines().any(|have| have == line),
                "{line} is not in\n{text}"
            );
        }
        // What waits for nothing any more is not in the queue.
        metrics.looked("a", false, 3);
        assert!(
            metrics
                .render([&one])
                .contains("\naccel_controller_queue 0\n")
        );

        // All of it is documented, and nothing else.
        let documents = include_str!("../../../ARCHITECTURE.md");
        let documented: BTreeSet<_> = documents
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
            .filter(|name| name.starts_with("accel_controller_"))
            .collect();
        let told: BTreeSet<_> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
            .collect();
        assert_eq!(told, documented);
    }
}
