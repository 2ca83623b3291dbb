mod jobs;
mod logins;
mod removal;

use super::*;
use crate::report::{Accelerated, Erofs, Image, Layer, Problem, Refused, Removal};
use crate::resource::{ImageAccelerationSpec, UfsSpec, UserStatus};
use accel_oci::{ChainId, Digest};
use std::sync::LazyLock;

static SETTINGS: LazyLock<Settings> = LazyLock::new(|| Settings {
    namespace: "image-accel".to_owned(),
    image: "h/mkfs-accel:1".to_owned(),
    cluster: "c".to_owned(),
});

/// A cluster with one task, in which what is planned happens.
struct Cluster {
    task: AcceleratedImage,
    service: Option<ImageAcceleration>,
    jobs: Vec<Job>,
    pod: Option<Pod>,
    log: Option<Result<Output, String>>,
    others_at_work: usize,
    nodes: Option<Vec<String>>,
    secret: Secret,
    now: i64,
}

impl Cluster {
    fn new() -> Self {
        let task = json!({
            "apiVersion": "image-accel.io/v1alpha1", "kind": "AcceleratedImage",
            "metadata": {"name": "a", "namespace": "team", "uid": "u", "generation": 1},
            "spec": {"source": "h/a:v1"},
        });
        let spec = ImageAccelerationSpec {
            ufs: UfsSpec {
                claim_name: Some("ufs".to_owned()),
                ..UfsSpec::default()
            },
            registry: Default::default(),
            jobs: Default::default(),
            nodes: Default::default(),
            purge: false,
        };
        Self {
            task: serde_json::from_value(task).unwrap(),
            service: Some(ImageAcceleration::new(SERVICE_NAME, spec)),
            jobs: Vec::new(),
            pod: None,
            log: None,
            others_at_work: 0,
            nodes: None,
            secret: Secret::Unnamed,
            now: 1_700_000_000,
        }
    }

    fn plan(&self) -> Plan {
        plan(&Observed {
            task: &self.task,
            service: self.service.as_ref(),
            jobs: &self.jobs,
            pod: self.pod.as_ref(),
            log: self.log.clone(),
            others_at_work: self.others_at_work,
            nodes: self.nodes.as_deref(),
            secret: self.secret,
            settings: &SETTINGS,
            now: Timestamp::from_second(self.now).unwrap(),
        })
    }

    /// Plans and does it; the plan's steps in short.
    fn step(&mut self) -> Vec<String> {
        self.now += 1;
        let plan = self.plan();
        if let Some(status) = plan.status {
            self.task.status = Some(status);
        }
        let finalizers = self.task.metadata.finalizers.get_or_insert_default();
        let does = plan.steps.into_iter().map(|step| match step {
            Step::AddFinalizer => {
                finalizers.push(FINALIZER.to_owned());
                "keep".to_owned()
            }
            Step::RemoveFinalizer => {
                finalizers.clear();
                "let go".to_owned()
            }
            Step::Run(job) => {
                let name = job.name_any();
                self.jobs.push(*job);
                format!("run {name}")
            }
            Step::Lend { job, uid } => format!("lend {job} {uid}"),
            Step::Hold(name) => {
                let mut held = self.jobs.iter_mut();
                let held = held.find(|job| job.name_any() == name).unwrap();
                let mut job = serde_json::to_value(&*held).unwrap();
                job["spec"]["parallelism"] = job::hold()["spec"]["parallelism"].clone();
                *held = serde_json::from_value(job).unwrap();
                format!("hold {name}")
            }
            Step::Stop(name) => {
                self.jobs.retain(|job| job.name_any() != name);
                format!("stop {name}")
            }
        });
        does.collect()
    }

    /// Until its Job is at work.
    fn working() -> Self {
        let mut cluster = Self::new();
        assert_eq!(cluster.step(), ["keep"]);
        assert_eq!(cluster.step(), ["run accel-u-1-0"]);
        cluster
    }

    fn end_job(&mut self, kind: &str, reason: &str) {
        let status = json!({"conditions": [{"type": kind, "status": "True", "reason": reason, "message": "m"}]});
        self.jobs.last_mut().unwrap().status = Some(serde_json::from_value(status).unwrap());
    }

    fn pod_says(&mut self, state: &serde_json::Value) {
        let pod = json!({"status": {"containerStatuses": [{
            "name": "convert", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state,
        }]}});
        self.pod = Some(serde_json::from_value(pod).unwrap());
    }

    fn status(&self) -> &AcceleratedImageStatus {
        self.task.status.as_ref().unwrap()
    }

    fn phase(&self) -> (Phase, &str) {
        (self.status().phase, &self.status().message)
    }

    fn condition(&self, kind: &str) -> &Condition {
        conditions::find(&self.status().conditions, kind).unwrap()
    }

    fn edit(&mut self, source: &str) {
        source.clone_into(&mut self.task.spec.source);
        *self.task.metadata.generation.as_mut().unwrap() += 1;
    }

    fn delete(&mut self) {
        self.task.metadata.deletion_timestamp = Some(Time(Timestamp::from_second(1).unwrap()));
        // As the API server does.
        *self.task.metadata.generation.as_mut().unwrap() += 1;
    }

    fn arguments(&self) -> Vec<String> {
        let pod = self.jobs.last().unwrap().spec.as_ref().unwrap();
        let pod = pod.template.spec.as_ref().unwrap();
        pod.containers[0].args.clone().unwrap()
    }
}

fn report() -> Output {
    let layer = |path: &str, shared| Layer {
        size: 100,
        shared,
        chain_id: Some(ChainId(Digest::of(path.as_bytes()))),
        erofs: Erofs {
            path: path.to_owned(),
            size: 1 << 20,
            index_size: 0,
        },
    };
    Output {
        report: Some(Report {
            manifest: "sha256:aa".to_owned(),
            images: vec![Image {
                layers: vec![layer("1", false), layer("2", true)],
            }],
            accelerated: vec![Accelerated {
                manifest: "sha256:bb".to_owned(),
            }],
        }),
        ..Output::default()
    }
}

#[test]
fn a_task_becomes_ready_and_its_job_goes() {
    let mut cluster = Cluster::working();
    assert_eq!(cluster.phase().0, Phase::Creating);
    assert_eq!(cluster.status().target, "h/a:v1-acc");
    let started = cluster.status().started_at.clone();
    assert!(started.is_some());

    cluster.pod_says(&json!({"running": {"startedAt": "2023-11-14T22:13:20Z"}}));
    cluster.log = Some(Ok(Output {
        progress: Some(Progress {
            platform: "linux/amd64".to_owned(),
            layers: 2,
            layers_done: 1,
            bytes: 3 << 20,
            bytes_done: 2 << 20,
        }),
        ..Output::default()
    }));
    cluster.now += 7;
    assert!(cluster.step().is_empty());
    let progress = cluster.status().progress.clone().unwrap();
    assert_eq!(progress.text, "1/2 layers, 66 % of 3.0 MiB");
    assert_eq!(progress.bytes_per_second, (2 << 20) / 10);
    cluster.now += 7;
    assert!(cluster.plan().status.is_none(), "nothing has changed");

    cluster.end_job("Complete", "");
    cluster.log = Some(Ok(report()));
    // First the result is written, then what it came from goes.
    assert!(cluster.step().is_empty());
    assert_eq!(cluster.phase().0, Phase::Ready);
    assert_eq!(cluster.condition("Ready").status, "True");
    assert_eq!(cluster.status().target_digest.as_deref(), Some("sha256:bb"));
    assert_eq!(
        (cluster.status().layers, cluster.status().stored.as_str()),
        (Some(2), "2.0 MiB")
    );
    assert_eq!(cluster.status().shared_bytes, Some(1 << 20));
    let top = ChainId(Digest::of(b"2")).to_string();
    assert_eq!(cluster.status().chain_ids, [top]);
    assert_eq!(cluster.status().started_at, started);
    assert_eq!(cluster.step(), ["stop accel-u-1-0"]);
    // And nothing else ever happens, whoever uses it.
    (cluster.pod, cluster.log) = (None, None);
    cluster.now += 100_000;
    let status = cluster.task.status.as_mut().unwrap();
    (status.used_by, status.used_by_count) = (vec!["n1".to_owned()], Some(1));
    let plan = cluster.plan();
    assert!(plan.status.is_none() && plan.steps.is_empty() && plan.again.is_none());
}

#[test]
fn a_job_that_failed_stays_to_be_looked_at_until_the_next_one() {
    let mut cluster = Cluster::working();
    cluster.end_job("Failed", "BackoffLimitExceeded");
    cluster.pod_says(&json!({"terminated": {"exitCode": 4, "reason": "Error",
        "message": "{\"progress\":{}}\nmkfs-accel: h/a:v1: not found\n"}}));
    assert!(cluster.step().is_empty());
    let (phase, message) = cluster.phase();
    assert_eq!(phase, Phase::CreateError);
    assert!(
        message.starts_with("h/a:v1: not found (the image cannot be had"),
        "{message}"
    );
    assert!(
        message.contains("Job accel-u-1-0") && message.contains("after 1 minutes"),
        "{message}"
    );
    assert!(!message.contains("progress"));

    for _ in 0..59 {
        assert!(cluster.step().is_empty());
    }
    assert_eq!(cluster.phase().0, Phase::CreateError);
    assert_eq!(cluster.step(), ["stop accel-u-1-0"]);
    assert_eq!(cluster.step(), ["run accel-u-1-1"]);
    assert_eq!(cluster.status().failures, 1);
}

#[test]
fn finalizers_of_others_stay() {
    let meta = |finalizers: &[&str]| -> ObjectMeta {
        serde_json::from_value(json!({"finalizers": finalizers, "resourceVersion": "7"})).unwrap()
    };
    for (has, keep, gets) in [
        (&["other"][..], true, &["other", FINALIZER][..]),
        (&["other", FINALIZER], true, &["other", FINALIZER]),
        (&[FINALIZER, "other"], false, &["other"]),
        (&[], false, &[]),
    ] {
        let expected = json!({"metadata": {"finalizers": gets, "resourceVersion": "7"}});
        assert_eq!(finalizer(&meta(has), keep), expected);
    }
}

#[test]
fn pauses_grow_and_have_an_end() {
    let pauses: Vec<_> = [1, 2, 3, 6, 7, 40, u32::MAX]
        .map(|n| pause(n).as_secs())
        .into();
    assert_eq!(pauses, [60, 120, 240, 1920, 3600, 3600, 3600]);
}

#[test]
fn errors_say_what_to_do() {
    for (exit, reason, job, said, advice) in [
        (
            137,
            "OOMKilled",
            "BackoffLimitExceeded",
            "",
            "spec.jobs.memoryMib",
        ),
        (
            5,
            "Error",
            "BackoffLimitExceeded",
            "mkfs-accel: /ufs: no space",
            "no space (UFS",
        ),
        (
            143,
            "Error",
            "DeadlineExceeded",
            "",
            "spec.jobs.deadlineSeconds",
        ),
        (99, "Error", "BackoffLimitExceeded", "", "ended with 99"),
    ] {
        let mut cluster = Cluster::working();
        cluster.end_job("Failed", job);
        cluster.pod_says(
            &json!({"terminated": {"exitCode": exit, "reason": reason, "message": said}}),
        );
        cluster.step();
        assert!(cluster.phase().1.contains(advice), "{}", cluster.phase().1);
    }
    // The pod is gone.
    let mut cluster = Cluster::working();
    cluster.end_job("Failed", "DeadlineExceeded");
    cluster.step();
    assert!(cluster.phase().1.contains("DeadlineExceeded: m"));
}

#[test]
fn what_a_pod_waits_for_is_told() {
    for (state, told) in [
        (
            json!({"waiting": {"reason": "ContainerCreating"}}),
            "is being started",
        ),
        (
            json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}),
            "ImagePullBackOff: no such image",
        ),
    ] {
        let mut cluster = Cluster::working();
        cluster.pod_says(&state);
        cluster.step();
        assert_eq!(cluster.phase().0, Phase::Creating);
        assert!(cluster.phase().1.contains(told), "{}", cluster.phase().1);
    }
    let mut cluster = Cluster::working();
    let pod = json!({"status": {"conditions": [
        {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}]}});
    cluster.pod = Some(serde_json::from_value(pod).unwrap());
    cluster.step();
    assert_eq!(
        cluster.phase().1,
        "no node takes its Job: 0/3 nodes are available"
    );
}

/// A pod that its node has taken so many seconds ago, and waits for that.
fn waiting_pod(cluster: &mut Cluster, seconds: i64, reason: &str) {
    cluster.pod_says(&json!({"waiting": {"reason": reason}}));
    let since = Timestamp::from_second(cluster.now - seconds).unwrap();
    let pod = cluster.pod.as_mut().unwrap();
    pod.status.as_mut().unwrap().start_time = Some(Time(since));
}

#[test]
fn that_ufs_may_be_away_is_noticed() {
    for (exit, expected) in [(5, Some("no answer (UFS")), (4, None), (3, None)] {
        let mut cluster = Cluster::working();
        cluster.end_job("Failed", "BackoffLimitExceeded");
        cluster.pod_says(&json!({"terminated": {"exitCode": exit, "reason": "Error",
            "message": "mkfs-accel: no answer\n"}}));
        let said = cluster.plan().ufs_fails;
        match expected {
            Some(expected) => assert!(said.unwrap().starts_with(expected)),
            None => assert_eq!(said, None),
        }
        // It is noticed once.
        cluster.step();
        cluster.now += 5;
        assert_eq!(cluster.plan().ufs_fails, None);
    }
    for (seconds, reason, expected) in [
        (119, "ContainerCreating", false),
        (120, "ContainerCreating", true),
        (10_000, "ImagePullBackOff", false),
    ] {
        let mut cluster = Cluster::working();
        waiting_pod(&mut cluster, seconds, reason);
        assert_eq!(cluster.plan().ufs_fails.is_some(), expected);
    }
}

#[test]
fn a_result_that_cannot_be_read_is_unknown_and_one_that_is_lost_is_made_again() {
    let mut cluster = Cluster::working();
    cluster.end_job("Complete", "");
    cluster.log = Some(Err("the node does not answer".to_owned()));
    assert!(cluster.step().is_empty());
    assert_eq!(cluster.phase().0, Phase::Unknown);
    assert!(cluster.phase().1.ends_with("the node does not answer"));
    assert_eq!(cluster.condition("Ready").status, "Unknown");

    (cluster.pod, cluster.log) = (None, None);
    for _ in 0..60 {
        assert!(cluster.step().is_empty());
        assert_eq!(cluster.phase().0, Phase::Creating);
    }
    assert_eq!(cluster.step(), ["stop accel-u-1-0"]);
    assert_eq!(cluster.step(), ["run accel-u-1-1"]);
    assert_eq!(cluster.status().finished_at, None);
}

#[test]
fn a_log_that_comes_late_is_waited_for_as_long_as_it_may_come() {
    let ended = |cluster: &mut Cluster| {
        cluster.end_job("Complete", "");
        let status = cluster.jobs.last_mut().unwrap().status.as_mut().unwrap();
        let now = Timestamp::from_second(cluster.now).unwrap();
        status.completion_time = Some(Time(now));
        // What a kubelet gives for one that it cannot get.
        cluster.log = Some(Ok(report::read("unable to retrieve container logs\n")));
    };
    let mut cluster = Cluster::working();
    ended(&mut cluster);
    for _ in 0..100 {
        assert!(cluster.step().is_empty());
        assert_eq!(cluster.status().failures, 0);
    }
    let what = "the Job has ended, and its node does not give its log yet";
    assert_eq!(cluster.phase(), (Phase::Creating, what));
    cluster.log = Some(Ok(report()));
    cluster.step();
    assert_eq!(cluster.phase().0, Phase::Ready);
    // Of what removes, too.
    cluster.step();
    cluster.delete();
    cluster.log = None;
    assert_eq!(cluster.step(), ["run accel-u-delete-0"]);
    ended(&mut cluster);
    for _ in 0..100 {
        assert!(cluster.step().is_empty());
        assert_eq!(cluster.phase().0, Phase::Deleting);
    }
    assert_eq!(cluster.status().failures, 0);

    let mut cluster = Cluster::working();
    ended(&mut cluster);
    cluster.now += 400;
    assert!(cluster.step().is_empty());
    assert_eq!(cluster.status().failures, 1);
    assert!(cluster.phase().1.contains("lost"), "{}", cluster.phase().1);
}

#[test]
fn there_are_never_more_jobs_than_the_limit() {
    let mut cluster = Cluster::new();
    cluster.step();
    cluster.others_at_work = 4;
    assert!(cluster.step().is_empty());
    assert_eq!(
        cluster.phase(),
        (
            Phase::Creating,
            "waits: 4 other Jobs are under way, the limit"
        )
    );
    assert!(cluster.plan().waits);
    cluster.others_at_work = 3;
    assert_eq!(cluster.step(), ["run accel-u-1-0"]);
    // One that is at work is not counted against itself.
    cluster.others_at_work = 4;
    assert!(!cluster.plan().waits);
    assert!(cluster.step().is_empty());
    assert!(cluster.phase().1.starts_with("its Job has no pod"));
    cluster.pod_says(&json!({"running": {}}));
    assert!(cluster.step().is_empty());
    assert_eq!(cluster.phase().1, "is being converted");
}

#[test]
fn without_the_service_tasks_wait_and_what_is_ready_stays() {
    let mut cluster = Cluster::working();
    let service = cluster.service.take();
    assert_eq!(cluster.step(), ["stop accel-u-1-0"]);
    assert_eq!(cluster.phase().0, Phase::Creating);
    assert_eq!(cluster.condition("Accepted").reason, "Disabled");
    cluster.service = service;
    assert_eq!(cluster.step(), ["run accel-u-1-0"]);
    assert_eq!(cluster.condition("Accepted").status, "True");
    cluster.end_job("Complete", "");
    cluster.log = Some(Ok(report()));
    cluster.step();
    cluster.service = None;
    cluster.step();
    assert_eq!(cluster.phase().0, Phase::Ready);
}

#[test]
fn a_spec_that_cannot_be_is_an_error_with_the_field_until_it_changes() {
    let mut cluster = Cluster::new();
    cluster.step();
    cluster.task.spec.target = Some("h/a:v1".to_owned());
    assert!(cluster.step().is_empty());
    assert_eq!(cluster.phase().0, Phase::CreateError);
    let accepted = cluster.condition("Accepted");
    assert_eq!(
        (accepted.status.as_str(), accepted.reason.as_str()),
        ("False", "Invalid")
    );
    assert!(accepted.message.starts_with("spec.target: "));
    assert!(cluster.plan().again.is_none());
    cluster.task.spec.target = None;
    cluster.edit("h/a:v1");
    assert_eq!(cluster.step(), ["run accel-u-2-0"]);
}

#[test]
fn another_source_ends_the_old_job_first() {
    let mut cluster = Cluster::working();
    cluster.edit("h/b:v1");
    assert_eq!(cluster.step(), ["stop accel-u-1-0"]);
    assert_eq!(cluster.status().observed_generation, 2);
    assert_eq!(cluster.step(), ["run accel-u-2-0"]);
    assert_eq!(cluster.status().target, "h/b:v1-acc");
    // What was said of the old one does not stand for the new one.
    cluster.end_job("Complete", "");
    cluster.log = Some(Ok(report()));
    cluster.step();
    cluster.step();
    cluster.edit("h/c:v1");
    assert_eq!(cluster.step(), ["run accel-u-3-0"]);
    assert_eq!(cluster.phase().0, Phase::Creating);
    assert_eq!(cluster.status().target_digest, None);
    assert!(cluster.status().chain_ids.is_empty());
    assert_eq!(cluster.condition("Ready").observed_generation, Some(3));
}

#[test]
fn a_task_that_is_edited_is_not_ready_any_more() {
    let mut cluster = Cluster::working();
    assert!(!is_ready(&cluster.task));
    cluster.end_job("Complete", "");
    cluster.log = Some(Ok(report()));
    cluster.step();
    assert!(is_ready(&cluster.task));
    // What it needs is looked for with the first look already.
    cluster.edit("h/b:v1");
    assert_eq!(cluster.phase().0, Phase::Ready);
    assert!(!is_ready(&cluster.task));
}

#[test]
fn the_service_matters_for_tasks_that_are_not_ready_and_for_those_that_go() {
    let mut cluster = Cluster::working();
    assert!(needs_service(&cluster.task));
    cluster.end_job("Complete", "");
    cluster.log = Some(Ok(report()));
    cluster.step();
    assert!(!needs_service(&cluster.task));
    let ready = cluster.task.clone();
    cluster.edit("h/b:v1");
    assert!(needs_service(&cluster.task));
    cluster.task = ready;
    cluster.task.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    assert!(needs_service(&cluster.task));
}

#[test]
fn conditions_keep_the_time_of_their_last_change() {
    let mut cluster = Cluster::working();
    let since = cluster.condition("Ready").last_transition_time.clone();
    cluster.step();
    assert_eq!(cluster.condition("Ready").last_transition_time, since);
    cluster.end_job("Complete", "");
    cluster.log = Some(Ok(report()));
    cluster.step();
    assert_ne!(cluster.condition("Ready").last_transition_time, since);
}
