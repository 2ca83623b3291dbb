use super::*;
use crate::report::{Accelerated, Erofs, Image, Layer, Problem, Refused, Removal};
use crate::resource::{ImageAccelerationSpec, UfsSpec, UserStatus};
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
}

fn report() -> Output {
    let layer = |path: &str| Layer {
        size: 100,
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
                layers: vec![layer("1"), layer("2")],
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
    assert_eq!(cluster.status().started_at, started);
    assert_eq!(cluster.step(), ["stop accel-u-1-0"]);
    // And nothing else ever happens.
    (cluster.pod, cluster.log) = (None, None);
    cluster.now += 100_000;
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

/// A task that has made something, and is deleted.
fn deleted() -> Cluster {
    let mut cluster = Cluster::working();
    cluster.end_job("Complete", "");
    cluster.log = Some(Ok(report()));
    cluster.step();
    cluster.step();
    (cluster.pod, cluster.log) = (None, None);
    cluster.delete();
    assert_eq!(cluster.step(), ["run accel-u-delete-0"]);
    assert_eq!(cluster.phase().0, Phase::Deleting);
    cluster
}

impl Cluster {
    fn delete(&mut self) {
        self.task.metadata.deletion_timestamp = Some(Time(Timestamp::from_second(1).unwrap()));
        // As the API server does.
        *self.task.metadata.generation.as_mut().unwrap() += 1;
    }

    /// The Job that removes has ended, and said this.
    fn removal_says(&mut self, exit: i32, removal: Removal) {
        let kind = if exit == 0 { "Complete" } else { "Failed" };
        self.end_job(kind, "BackoffLimitExceeded");
        self.pod_says(&json!({"terminated": {"exitCode": exit, "reason": "Error", "message": "mkfs-accel: said\n"}}));
        self.log = Some(Ok(Output {
            removal: Some(removal),
            ..Output::default()
        }));
    }

    fn arguments(&self) -> Vec<String> {
        let pod = self.jobs.last().unwrap().spec.as_ref().unwrap();
        let pod = pod.template.spec.as_ref().unwrap();
        pod.containers[0].args.clone().unwrap()
    }
}

fn used_by(nodes: &[(&str, &str, bool)]) -> Removal {
    let user = |(cluster, node, expired): &(&str, &str, bool)| UserStatus {
        cluster: (*cluster).to_owned(),
        node: (*node).to_owned(),
        expired: *expired,
    };
    Removal {
        in_use: nodes.iter().map(user).collect(),
        ..Removal::default()
    }
}

#[test]
fn a_task_goes_when_what_it_made_is_gone() {
    let mut cluster = deleted();
    let arguments = cluster.arguments().join(" ");
    assert!(
        arguments.starts_with("delete --claim c/u --ufs /ufs"),
        "{arguments}"
    );
    assert!(cluster.step().is_empty());
    let removed = Removal {
        removed: Some(crate::report::Removed { layers: 2, kept: 1 }),
        ..Removal::default()
    };
    cluster.removal_says(0, removed);
    // First it is written that it is done, then the Job goes, then the task.
    assert!(cluster.step().is_empty());
    assert_eq!(cluster.condition(REMOVED).status, "True");
    assert_eq!(
        cluster.phase().1,
        "2 layers are removed, 1 stay, which others need"
    );
    assert_eq!(cluster.step(), ["stop accel-u-delete-0"]);
    (cluster.pod, cluster.log) = (None, None);
    assert_eq!(cluster.step(), ["let go"]);
    assert!(cluster.step().is_empty());
}

#[test]
fn a_conversion_ends_before_its_layers_go() {
    let mut cluster = Cluster::working();
    cluster.delete();
    assert_eq!(cluster.step(), ["stop accel-u-1-0"]);
    assert_eq!(cluster.phase().0, Phase::Deleting);
    assert_eq!(cluster.step(), ["run accel-u-delete-0"]);
}

#[test]
fn a_task_that_has_made_nothing_goes_at_once() {
    let mut cluster = Cluster::new();
    cluster.step();
    cluster.others_at_work = 9;
    cluster.step();
    cluster.delete();
    assert_eq!(cluster.step(), ["let go"]);
    // Without the service nobody can remove anything: that is told.
    let mut cluster = deleted();
    cluster.service = None;
    cluster.jobs.clear();
    assert_eq!(cluster.step(), ["let go"]);
    assert!(
        cluster.phase().1.contains("stays on UFS"),
        "{:?}",
        cluster.phase()
    );
}

#[test]
fn what_nodes_use_waits_for_them_and_they_are_named() {
    let mut cluster = deleted();
    cluster.removal_says(6, used_by(&[("c", "n1", false), ("d", "n1", false)]));
    assert_eq!(cluster.step(), ["stop accel-u-delete-0"]);
    let waits = "waits: it is in use on n1, n1 of the cluster d";
    assert_eq!(cluster.phase(), (Phase::Deleting, waits));
    assert_eq!(cluster.condition(IN_USE).status, "True");
    (cluster.pod, cluster.log) = (None, None);
    // The Job takes its time to go, and its pod is gone before it.
    let going = json!({"metadata": {"name": "accel-u-delete-0", "deletionTimestamp": "2023-11-14T22:13:20Z"},
        "status": {"conditions": [{"type": "Failed", "status": "True"}]}});
    cluster.jobs = vec![serde_json::from_value(going).unwrap()];
    assert!(cluster.step().is_empty());
    assert_eq!(cluster.phase(), (Phase::Deleting, waits));
    cluster.jobs.clear();
    for _ in 0..8 {
        assert!(cluster.step().is_empty());
    }
    assert_eq!(cluster.step(), ["run accel-u-delete-0"]);
    // It is still said while it is looked again.
    assert_eq!(cluster.phase(), (Phase::Deleting, waits));
    assert!(cluster.step().is_empty());
    assert_eq!(cluster.phase(), (Phase::Deleting, waits));
    cluster.removal_says(0, Removal::default());
    assert!(cluster.step().is_empty());
    assert_eq!(cluster.condition(IN_USE).status, "False");
    assert!(cluster.status().used_by.is_empty());
}

#[test]
fn a_silent_node_counts_as_long_as_there_is_one_of_that_name() {
    for (nodes, gone) in [
        (None, vec![]),
        (Some(vec!["n1", "n2"]), vec![]),
        (Some(vec!["n1"]), vec!["c/n2"]),
        (Some(vec![]), vec!["c/n2"]),
    ] {
        let mut cluster = deleted();
        let users = [("c", "n1", false), ("c", "n2", true), ("d", "n3", true)];
        cluster.removal_says(6, used_by(&users));
        cluster.step();
        (cluster.pod, cluster.log) = (None, None);
        cluster.nodes = nodes.map(|all| all.into_iter().map(str::to_owned).collect());
        cluster.now += 10;
        assert_eq!(cluster.step(), ["run accel-u-delete-0"]);
        let arguments = cluster.arguments();
        let named = arguments.windows(2).filter(|pair| pair[0] == "--gone");
        let named: Vec<_> = named.map(|pair| pair[1].as_str()).collect();
        assert_eq!(named, gone);
    }
}

#[test]
fn what_cannot_be_removed_is_tried_again_and_says_why() {
    let mut cluster = deleted();
    cluster.end_job("Failed", "BackoffLimitExceeded");
    cluster.pod_says(&json!({"terminated": {"exitCode": 5, "reason": "Error",
        "message": "mkfs-accel: cannot open /ufs\n"}}));
    assert!(cluster.step().is_empty());
    assert_eq!(cluster.phase().0, Phase::DeleteError);
    assert!(
        cluster.phase().1.starts_with("cannot open /ufs (UFS"),
        "{:?}",
        cluster.phase()
    );
    (cluster.pod, cluster.log) = (None, None);
    for _ in 0..14 {
        assert!(cluster.step().is_empty());
    }
    assert_eq!(cluster.step(), ["stop accel-u-delete-0"]);
    assert_eq!(cluster.step(), ["run accel-u-delete-1"]);
    // It hangs.
    cluster.end_job("Failed", "DeadlineExceeded");
    cluster.pod_says(&json!({"waiting": {"reason": "ContainerCreating"}}));
    cluster.step();
    let (phase, message) = cluster.phase();
    assert_eq!(phase, Phase::DeleteError);
    assert!(message.starts_with("UFS does not answer"), "{message}");
    assert!(message.contains("after 30 s"), "{message}");
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

#[test]
fn jobs_may_do_little_and_are_told_no_secret() {
    let mut cluster = Cluster::new();
    cluster.step();
    let service = cluster.service.as_mut().unwrap();
    service.spec.registry.secret_name = Some("login".to_owned());
    service.spec.registry.plain_http = true;
    cluster.task.spec.platforms = vec!["all".to_owned()];
    cluster.step();
    let job = serde_json::to_value(&cluster.jobs[0]).unwrap();
    assert_eq!(job["metadata"]["namespace"], "image-accel");
    assert_eq!(job::task_of(&cluster.jobs[0]), Some(("team", "a")));
    let pod = &job["spec"]["template"]["spec"];
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    let container = &pod["containers"][0];
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    assert_eq!(
        container["securityContext"]["capabilities"]["drop"],
        json!(["ALL"])
    );
    assert_eq!(container.get("env"), None);
    let arguments = [
        "convert",
        "docker://h/a:v1",
        "--ufs",
        "/ufs",
        "--claim",
        "c/u",
        "--push",
        "docker://h/a:v1-acc",
        "--platform",
        "all",
        "--json-lines",
        "--registry-config",
        "/login/config.json",
        "--plain-http",
    ];
    assert_eq!(container["args"], json!(arguments));
    let secret = &pod["volumes"][1]["secret"];
    // Whether there is one the Job tells.
    assert_eq!(
        (&secret["secretName"], &secret["optional"]),
        (&json!("login"), &json!(true))
    );
}

/// What the Job says of a registry, and that it has failed.
fn refused(problem: Problem) -> Output {
    let registry = "h".to_owned();
    Output {
        refused: Some(Refused { registry, problem }),
        ..Output::default()
    }
}

#[test]
fn a_registry_that_does_not_let_us_is_a_condition_with_what_to_do() {
    for (problem, secret, reason, advice) in [
        (
            Problem::Unauthorized,
            Some("login"),
            "Unauthorized",
            "password for h in the Secret login",
        ),
        (
            Problem::Forbidden,
            Some("login"),
            "Forbidden",
            "the right at h",
        ),
        (
            Problem::NoLogin,
            Some("login"),
            "NoLogin",
            "login in the controller's namespace",
        ),
        (Problem::NoLogin, None, "NoLogin", "no Secret is named"),
        (
            Problem::NoLoginFile,
            Some("login"),
            "NoSecret",
            "is not there",
        ),
        (
            Problem::NotFound,
            None,
            "NotFound",
            "the image cannot be had",
        ),
        (Problem::NoTarget, None, "NotFound", "name another target"),
        (Problem::Unreachable, None, "Unreachable", "plainHttp"),
        (Problem::Other, None, "Failed", "answer"),
    ] {
        let mut cluster = Cluster::new();
        cluster.step();
        let service = cluster.service.as_mut().unwrap();
        service.spec.registry.secret_name = secret.map(str::to_owned);
        cluster.step();
        assert_eq!(cluster.condition(ACCESS).status, "Unknown");
        cluster.end_job("Failed", "BackoffLimitExceeded");
        cluster.pod_says(&json!({"terminated": {"exitCode": 4, "reason": "Error",
            "message": "{\"refused\":{}}\nmkfs-accel: it says no\n"}}));
        cluster.log = Some(Ok(refused(problem)));
        cluster.step();
        let access = cluster.condition(ACCESS).clone();
        assert_eq!((&*access.status, &*access.reason), ("False", reason));
        assert!(
            access.message.starts_with("it says no ("),
            "{}",
            access.message
        );
        assert!(access.message.contains(advice), "{}", access.message);
        assert_eq!(cluster.phase().0, Phase::CreateError);
        assert!(
            cluster.phase().1.starts_with(&access.message),
            "{:?}",
            cluster.phase()
        );
        // It stands until there is something better to say.
        (cluster.pod, cluster.log) = (None, None);
        cluster.now += 60;
        cluster.step();
        assert_eq!(cluster.step(), ["run accel-u-1-1"]);
        assert_eq!(cluster.condition(ACCESS).reason, reason);
        cluster.log = Some(Ok(Output {
            checked: true,
            ..Output::default()
        }));
        cluster.step();
        assert_eq!(cluster.condition(ACCESS).status, "True");
        // Of another version of the task nothing is known.
        cluster.edit("h/b:v1");
        cluster.step();
        cluster.step();
        assert_eq!(cluster.condition(ACCESS).status, "Unknown");
    }
}

impl Cluster {
    /// The first of the tries that a Job has ended with a refusal.
    fn refused(problem: Problem) -> Self {
        let mut cluster = Self::working();
        cluster.pod_says(&json!({"terminated": {"exitCode": 4, "reason": "Error",
            "message": "mkfs-accel: it says no\n"}}));
        cluster.log = Some(Ok(refused(problem)));
        cluster
    }
}

#[test]
fn what_does_not_pass_by_itself_is_tried_once_and_told_at_once() {
    for problem in [
        Problem::NoLoginFile,
        Problem::NoLogin,
        Problem::Unauthorized,
        Problem::Forbidden,
        Problem::NotFound,
        Problem::NoTarget,
    ] {
        let mut cluster = Cluster::refused(problem);
        assert_eq!(cluster.step(), ["hold accel-u-1-0"]);
        assert_eq!(cluster.condition(ACCESS).status, "False");
        assert_eq!(cluster.phase().0, Phase::CreateError);
        assert!(cluster.phase().1.starts_with("it says no ("));
        assert!(cluster.phase().1.contains("after 1 minutes"));
        assert_eq!(cluster.status().failures, 1);
        // It stays to be looked at, and takes no other's place.
        assert!(!job::is_at_work(&cluster.jobs[0]));
        for _ in 0..59 {
            assert!(cluster.step().is_empty());
        }
        assert_eq!(cluster.step(), ["stop accel-u-1-0"]);
        (cluster.pod, cluster.log) = (None, None);
        assert_eq!(cluster.step(), ["run accel-u-1-1"]);
    }
    // The controller was killed before it had done it.
    let mut cluster = Cluster::refused(Problem::Unauthorized);
    let job = cluster.jobs[0].clone();
    cluster.step();
    cluster.jobs = vec![job];
    assert_eq!(cluster.step(), ["hold accel-u-1-0"]);
}

#[test]
fn what_may_pass_is_told_and_the_job_tries_again() {
    for problem in [Problem::Unreachable, Problem::Other] {
        let mut cluster = Cluster::refused(problem);
        assert!(cluster.step().is_empty());
        assert_eq!(cluster.condition(ACCESS).status, "False");
        assert_eq!(cluster.phase().0, Phase::Creating);
        assert!(cluster.phase().1.ends_with("; its Job tries again"));
        assert!(job::is_at_work(&cluster.jobs[0]));
        cluster.pod_says(&json!({"running": {}}));
        cluster.log = Some(Ok(Output {
            checked: true,
            ..Output::default()
        }));
        assert!(cluster.step().is_empty());
        assert_eq!(cluster.condition(ACCESS).status, "True");
    }
}

#[test]
fn a_task_has_its_login_from_its_own_namespace() {
    let mut cluster = Cluster::new();
    cluster.task.spec.secret_name = Some("mine".to_owned());
    cluster.service.as_mut().unwrap().spec.registry.secret_name = Some("login".to_owned());
    cluster.step();
    for (secret, reason, said) in [
        (
            Secret::Missing,
            "NoSecret",
            "no Secret mine in the namespace team",
        ),
        (Secret::OtherType, "NoSecret", ".dockerconfigjson"),
        (
            Secret::Forbidden,
            "SecretNotReadable",
            "secret-access team mine",
        ),
    ] {
        cluster.secret = secret;
        assert!(cluster.step().is_empty());
        let access = cluster.condition(ACCESS);
        assert_eq!((&*access.status, &*access.reason), ("False", reason));
        assert!(access.message.starts_with("spec.secretName: "));
        assert!(access.message.contains(said), "{}", access.message);
        assert_eq!(cluster.phase().0, Phase::CreateError);
        assert_eq!(cluster.plan().again, Some(FIRST_RETRY));
    }
    cluster.secret = Secret::There;
    assert_eq!(cluster.step(), ["run accel-u-1-0"]);
    assert_eq!(cluster.condition(ACCESS).status, "Unknown");
    let job = cluster.jobs.last_mut().unwrap();
    job.metadata.uid = Some("j".to_owned());
    let pod = serde_json::to_value(job.spec.as_ref().unwrap().template.spec.as_ref()).unwrap();
    // It waits for its own copy, which has its own name.
    let login = &pod["volumes"][1]["secret"];
    assert_eq!(
        (&login["secretName"], login.get("optional")),
        (&json!("accel-u-1-0"), None)
    );
    assert!(
        cluster
            .arguments()
            .contains(&"--registry-config".to_owned())
    );
    // Whoever made the Job may have been killed before the copy was there.
    assert_eq!(cluster.step(), ["lend accel-u-1-0 j"]);
    cluster.log = Some(Ok(Output::default()));
    assert!(cluster.step().is_empty());
    cluster.end_job("Complete", "");
    cluster.log = Some(Ok(report()));
    cluster.step();
    cluster.step();
    assert_eq!(cluster.condition(ACCESS).status, "True");
    (cluster.pod, cluster.log) = (None, None);
    // What is removed needs it, too, if it is still there.
    for (secret, name) in [
        (Secret::There, "accel-u-delete-0"),
        (Secret::Missing, "login"),
    ] {
        let mut cluster = Cluster {
            task: cluster.task.clone(),
            service: cluster.service.clone(),
            secret,
            ..Cluster::new()
        };
        cluster.delete();
        assert_eq!(cluster.step(), ["run accel-u-delete-0"]);
        let pod = serde_json::to_value(&cluster.jobs[0]).unwrap();
        let volumes = &pod["spec"]["template"]["spec"]["volumes"];
        assert_eq!(volumes[1]["secret"]["secretName"], name);
    }
}

/// A task with a Secret of its own, whose Job waits for the copy.
fn lent() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.task.spec.secret_name = Some("mine".to_owned());
    cluster.service.as_mut().unwrap().spec.registry.secret_name = Some("login".to_owned());
    cluster.secret = Secret::There;
    cluster.step();
    assert_eq!(cluster.step(), ["run accel-u-1-0"]);
    cluster.jobs[0].metadata.uid = Some("j".to_owned());
    cluster
}

#[test]
fn a_job_does_not_wait_for_a_secret_that_cannot_be_had() {
    for (secret, reason) in [
        (Secret::Missing, "NoSecret"),
        (Secret::OtherType, "NoSecret"),
        (Secret::Forbidden, "SecretNotReadable"),
    ] {
        let mut cluster = lent();
        let job = cluster.jobs[0].clone();
        cluster.secret = secret;
        assert_eq!(cluster.step(), ["stop accel-u-1-0"]);
        assert_eq!(cluster.condition(ACCESS).reason, reason);
        assert_eq!(cluster.phase().0, Phase::CreateError);
        assert!(cluster.phase().1.starts_with("spec.secretName: "));
        // It takes its time to go.
        cluster.jobs = vec![job];
        let going = Some(Time(Timestamp::UNIX_EPOCH));
        cluster.jobs[0].metadata.deletion_timestamp = going;
        assert!(cluster.plan().status.is_none() && cluster.plan().steps.is_empty());
        cluster.jobs.clear();
        assert!(cluster.step().is_empty());
        assert_eq!(cluster.phase().0, Phase::CreateError);
        assert_eq!(cluster.plan().again, Some(FIRST_RETRY));
        cluster.secret = Secret::There;
        assert_eq!(cluster.step(), ["run accel-u-1-0"]);
    }
    // One that has begun has what it needs.
    let mut cluster = lent();
    cluster.log = Some(Ok(Output::default()));
    cluster.secret = Secret::Missing;
    assert!(cluster.step().is_empty());
}

#[test]
fn what_is_made_is_removed_with_the_login_of_the_service_if_the_own_one_goes_meanwhile() {
    let mut cluster = lent();
    cluster.delete();
    assert_eq!(cluster.step(), ["stop accel-u-1-0"]);
    assert_eq!(cluster.step(), ["run accel-u-delete-0"]);
    cluster.jobs[0].metadata.uid = Some("k".to_owned());
    assert_eq!(cluster.step(), ["lend accel-u-delete-0 k"]);
    cluster.secret = Secret::Missing;
    assert_eq!(cluster.step(), ["stop accel-u-delete-0"]);
    assert_eq!(cluster.phase().0, Phase::Deleting);
    assert_eq!(cluster.step(), ["run accel-u-delete-0"]);
    assert!(!job::is_lent(&cluster.jobs[0]));
}

#[test]
fn a_job_whose_secret_the_cluster_refuses_ends_and_the_next_one_waits() {
    let cluster = lent();
    let job = cluster.jobs[0].clone();
    let now = Timestamp::from_second(cluster.now).unwrap();
    let lend = Step::Lend {
        job: "accel-u-1-0".to_owned(),
        uid: "j".to_owned(),
    };
    for step in [lend, Step::Run(Box::new(job))] {
        let status = cluster.status().clone();
        let (said, stuck) = super::refused(&cluster.task, status, &step, "no more Secrets", now);
        assert_eq!(stuck.as_deref(), Some("accel-u-1-0"));
        assert_eq!(said.phase, Phase::CreateError);
        assert!(said.message.ends_with(": no more Secrets"));
        let mut cluster = lent();
        cluster.task.status = Some(said);
        cluster.jobs.clear();
        for _ in 0..59 {
            assert!(cluster.step().is_empty());
            assert_eq!(cluster.phase().0, Phase::CreateError);
        }
        cluster.now += 1;
        assert_eq!(cluster.step(), ["run accel-u-1-0"]);
    }
    // Others need no Secret.
    let plain = Cluster::working();
    let step = Step::Run(Box::new(plain.jobs[0].clone()));
    let (_, stuck) = super::refused(&plain.task, plain.status().clone(), &step, "", now);
    assert_eq!(stuck, None);
}

#[test]
fn jobs_get_ufs_from_where_it_is() {
    let nfs = json!({"server": "h", "path": "/export"});
    for (ufs, volume) in [
        (
            json!({"claimName": "u"}),
            json!({"persistentVolumeClaim": {"claimName": "u"}}),
        ),
        (json!({"nfs": nfs}), json!({"nfs": nfs})),
        (
            json!({"hostPath": "/mnt/ufs"}),
            json!({"hostPath": {"path": "/mnt/ufs", "type": "Directory"}}),
        ),
    ] {
        let mut cluster = Cluster::new();
        cluster.step();
        cluster.service.as_mut().unwrap().spec.ufs = serde_json::from_value(ufs).unwrap();
        cluster.step();
        let job = serde_json::to_value(&cluster.jobs[0]).unwrap();
        let mut expected = volume;
        expected["name"] = json!("ufs");
        assert_eq!(
            job["spec"]["template"]["spec"]["volumes"],
            json!([expected])
        );
    }
}
