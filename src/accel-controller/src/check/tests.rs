use super::*;
use crate::report::{Output, Problem, Refused, Tried};
use crate::service;
use serde_json::Value;

/// A service, and the Jobs that ask for it.
struct Service {
    service: ImageAcceleration,
    jobs: Vec<Job>,
    pod: Option<Pod>,
    log: Option<Result<Output, String>>,
    events: Vec<Event>,
    nodes: Option<Ufs>,
    trouble: Option<Trouble>,
    now: i64,
}

impl Service {
    fn new(registry: Value) -> Self {
        let mut service = json!({
            "apiVersion": "image-accel.io/v1alpha1", "kind": "ImageAcceleration",
            "metadata": {"name": "cluster", "uid": "s", "generation": 1},
            "spec": {"ufs": {"claimName": "ufs"}},
        });
        service["spec"]["registry"] = registry;
        Self {
            service: serde_json::from_value(service).unwrap(),
            jobs: Vec::new(),
            pod: None,
            log: None,
            events: Vec::new(),
            nodes: None,
            trouble: None,
            now: 1_700_000_000,
        }
    }

    /// Plans and does it: the plan's steps in short.
    fn step(&mut self) -> Vec<&'static str> {
        self.now += 1;
        let now = Timestamp::from_second(self.now).unwrap();
        let settings = Settings {
            namespace: "image-accel".to_owned(),
            image: "h/mkfs-accel:1".to_owned(),
            cluster: "c".to_owned(),
        };
        let checked = check(&Checking {
            service: &self.service,
            jobs: &self.jobs,
            pod: self.pod.as_ref(),
            log: self.log.clone(),
            events: &self.events,
            nodes: self.nodes.as_ref(),
            trouble: self.trouble.as_ref(),
            settings: &settings,
            now,
        });
        let claim = json!({"metadata": {"name": "ufs"}, "status": {"phase": "Bound"}});
        let claim = serde_json::from_value(claim).unwrap();
        let controller = service::controller("one", None);
        let status = service::status(
            &self.service,
            &controller,
            &checked,
            Some(&claim),
            [],
            None,
            now,
        );
        self.service.status = Some(status);
        let does = checked.steps.into_iter().map(|step| match step {
            Step::Run(job) => {
                self.jobs.push(*job);
                "run"
            }
            Step::Stop(name) => {
                self.jobs.retain(|job| job.name_any() != name);
                "stop"
            }
        });
        does.collect()
    }

    fn said(&self, type_: &str) -> (String, String, String) {
        let status = self.service.status.as_ref().unwrap();
        let said = conditions::find(&status.conditions, type_).unwrap();
        (
            said.status.clone(),
            said.reason.clone(),
            said.message.clone(),
        )
    }

    fn access(&self) -> (String, String, String) {
        self.said(ACCESS)
    }

    fn ufs(&self) -> (String, String, String) {
        self.said(UFS_READY)
    }

    /// A status and a reason.
    fn ufs_is(&self) -> String {
        let (is, why, _) = self.ufs();
        format!("{is} {why}")
    }

    /// The first Job has tried all of it, and is gone.
    fn pass(&mut self) {
        self.step();
        self.end_job("Complete");
        self.step();
        assert_eq!(self.step(), ["stop"]);
        assert_eq!(self.ufs_is(), "True Tried");
    }

    /// Looks until it does something, or for so many seconds; after how many, and what.
    fn wait(&mut self, seconds: i64) -> (i64, Vec<&'static str>) {
        for second in 1..=seconds {
            let does = self.step();
            if !does.is_empty() {
                return (second, does);
            }
        }
        (seconds, Vec::new())
    }

    /// What the Job says of UFS, and no more yet.
    fn job_says(&mut self, error: Option<&str>) {
        let ufs = Tried {
            usable: error.is_none(),
            error: error.map(str::to_owned),
        };
        self.log = Some(Ok(Output {
            ufs: Some(ufs),
            ..Output::default()
        }));
    }

    /// What the node says of the Job's pod.
    fn node_says(&mut self, second: i64, message: &str) {
        let last = Timestamp::from_second(second).unwrap().to_string();
        let event = json!({"metadata": {}, "involvedObject": {}, "reason": FAILED_MOUNT,
            "lastTimestamp": last, "message": message});
        self.events.push(serde_json::from_value(event).unwrap());
        let pod = json!({"status": {"containerStatuses": [{
            "name": "convert", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"waiting": {"reason": "ContainerCreating"}},
        }]}});
        self.pod = Some(serde_json::from_value(pod).unwrap());
    }

    fn end_job(&mut self, kind: &str) {
        let status = json!({"conditions": [{"type": kind, "status": "True", "reason": "BackoffLimitExceeded"}]});
        self.jobs.last_mut().unwrap().status = Some(serde_json::from_value(status).unwrap());
    }

    fn fail_job(&mut self, problem: Problem) {
        self.end_job("Failed");
        let pod = json!({"status": {"containerStatuses": [{
            "name": "convert", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 4, "reason": "Error", "message": "mkfs-accel: it says no\n"}},
        }]}});
        self.pod = Some(serde_json::from_value(pod).unwrap());
        self.job_says(None);
        if let Some(Ok(output)) = &mut self.log {
            output.refused = Some(Refused {
                registry: "h:5000".to_owned(),
                problem,
            });
        }
    }
}

#[test]
fn without_a_secret_ufs_is_tried_and_nobody_asked() {
    let mut service = Service::new(json!({}));
    assert_eq!(service.step(), ["run"]);
    assert_eq!(service.access().0, "True");
    assert_eq!(service.access().1, "NothingToCheck");
    assert_eq!(service.ufs().0, "Unknown");
    service.end_job("Complete");
    assert!(service.step().is_empty());
    assert_eq!(service.access().1, "NothingToCheck");
    let what = "a Job has written to the PersistentVolumeClaim ufs, and read it back";
    assert_eq!(
        service.ufs(),
        ["True", "Tried", what].map(str::to_owned).into()
    );
    assert_eq!(service.step(), ["stop"]);
    // Another place is another try.
    service.service.spec.ufs = serde_json::from_value(json!({"hostPath": "/mnt"})).unwrap();
    assert_eq!(service.step(), ["run"]);
    assert_eq!(service.ufs().0, "Unknown");
}

#[test]
fn ufs_that_cannot_be_mounted_is_told_at_once_and_tried_on() {
    let mut service = Service::new(json!({"secretName": "login"}));
    let ufs = json!({"nfs": {"server": "nowhere", "path": "/x"}});
    service.service.spec.ufs = serde_json::from_value(ufs).unwrap();
    service.step();
    service.node_says(2, "MountVolume.SetUp failed for volume \"ufs\" : mount failed: exit status 32\nMounting command: systemd-run\nMounting arguments: --scope -- mount -t nfs nowhere:/x /p\nOutput: Running scope as unit: run-1.scope\nmount.nfs: Failed to resolve server nowhere");
    service.node_says(1, "MountVolume.SetUp failed for volume \"ufs\" : old");
    service.node_says(3, "Unable to attach or mount volumes: timed out");
    assert!(service.step().is_empty());
    let (is, why, message) = service.ufs();
    assert_eq!((&*is, &*why), ("False", NOT_MOUNTED));
    let said = "nowhere:/x cannot be mounted: mount.nfs: Failed to resolve server nowhere (is the server's name right";
    assert!(message.starts_with(said), "{message}");
    assert_eq!(service.access().0, "Unknown");
    // With its deadline the pod goes, and it is still said.
    service.end_job("Failed");
    (service.pod, service.events) = (None, Vec::new());
    for _ in 0..3 {
        service.step();
        let (is, _, message) = service.ufs();
        assert!(is == "False" && message.starts_with(said), "{message}");
        assert!(message.contains("after 1 minutes"), "{message}");
    }
    service.now += 60;
    assert_eq!(service.step(), ["stop"]);
    assert_eq!(service.step(), ["run"]);
    service.end_job("Failed");
    service.step();
    let message = service.ufs().2;
    assert_eq!(message.matches(" (Job ").count(), 1, "{message}");
    // Somebody has made the server.
    service.now += 120;
    service.step();
    service.step();
    service.job_says(None);
    assert!(service.step().is_empty());
    assert_eq!(service.ufs().0, "True");
    assert_eq!(service.access().0, "Unknown");
    service.end_job("Complete");
    service.step();
    assert_eq!(service.access().0, "True");
}

#[test]
fn what_a_node_says_of_other_things_is_not_ufs() {
    let mut service = Service::new(json!({"secretName": "login"}));
    service.step();
    service.node_says(1, "MountVolume.SetUp failed for volume \"login\" : failed to sync secret cache: timed out waiting for the condition");
    service.node_says(2, "Unable to attach or mount volumes: unmounted volumes=[login], unattached volumes=[], failed to process volumes=[]: context deadline exceeded");
    service.step();
    assert_eq!(service.ufs().0, "Unknown");
    service.node_says(3, "MountVolume.SetUp failed for volume \"pvc-1\" : not yet");
    service.step();
    assert_eq!(service.ufs().1, NOT_MOUNTED);
    // It is mounted in the end, and the image is not there.
    let pod = json!({"status": {"containerStatuses": [{
        "name": "convert", "image": "", "imageID": "", "ready": false, "restartCount": 0,
        "state": {"waiting": {"reason": "ImagePullBackOff"}},
    }]}});
    service.pod = Some(serde_json::from_value(pod).unwrap());
    service.step();
    let (is, _, message) = service.ufs();
    assert!(
        is == "Unknown" && message.contains("ImagePullBackOff"),
        "{message}"
    );
}

#[test]
fn a_job_that_goes_slowly_keeps_nobody_waiting() {
    let mut service = Service::new(json!({}));
    service.step();
    let now = Timestamp::from_second(service.now).unwrap();
    service.jobs[0].metadata.deletion_timestamp = Some(Time(now));
    service.service.spec.ufs = serde_json::from_value(json!({"hostPath": "/mnt"})).unwrap();
    assert_eq!(service.step(), ["run"]);
    service.end_job("Complete");
    service.step();
    // The one that is done with, not the other one once more.
    assert_eq!(service.step(), ["stop"]);
    assert_eq!(service.jobs.len(), 1);
    assert!(service.step().is_empty());
    assert_eq!(service.ufs().0, "True");
}

#[test]
fn ufs_that_cannot_be_written_to_is_told_and_tried_again() {
    let mut service = Service::new(json!({}));
    service.step();
    service.job_says(Some(
        "cannot make the directory \"/ufs/tmp\": Permission denied",
    ));
    service.end_job("Failed");
    assert!(service.step().is_empty());
    let (is, why, message) = service.ufs();
    assert_eq!((&*is, &*why), ("False", NOT_USABLE));
    assert!(
        message.contains("Permission denied (is it writable for the user 65532"),
        "{message}"
    );
    (service.pod, service.log) = (None, None);
    for _ in 0..59 {
        assert!(service.step().is_empty());
    }
    assert_eq!(service.step(), ["stop"]);
    assert_eq!(service.step(), ["run"]);
    assert_eq!(service.ufs().2, message);
    service.end_job("Complete");
    service.step();
    assert_eq!(service.ufs().0, "True");
}

#[test]
fn registries_are_asked_once_for_all_settings_of_them() {
    let mut service = Service::new(json!({"secretName": "login", "pushTo": "h:5000/team"}));
    assert_eq!(service.step(), ["run"]);
    assert_eq!(service.access().0, "Unknown");
    let job = serde_json::to_value(&service.jobs[0]).unwrap();
    let pod = &job["spec"]["template"]["spec"];
    let arguments = [
        "check",
        "--json",
        "--ufs",
        "/ufs",
        "h:5000",
        "--registry-config",
        "/login/config.json",
    ];
    assert_eq!(pod["containers"][0]["args"], json!(arguments));
    // Pod security may not let it have one.
    service.step();
    assert!(service.ufs().2.contains("describe job accel-check-"));
    // It has what all Jobs have, and goes with the service.
    let volumes = pod["volumes"].as_array().unwrap();
    assert_eq!(volumes.len(), 2);
    assert_eq!(volumes[0]["persistentVolumeClaim"]["claimName"], "ufs");
    assert_eq!(volumes[1]["secret"]["secretName"], "login");
    assert_eq!(job["metadata"]["ownerReferences"][0]["uid"], "s");
    assert!(service.step().is_empty());

    service.end_job("Complete");
    assert!(service.step().is_empty());
    assert_eq!(service.access().0, "True");
    assert_eq!(service.step(), ["stop"]);
    for _ in 0..3 {
        service.now += 10_000;
        assert!(service.step().is_empty());
        assert_eq!(service.access().1, "Checked");
    }
    // The limit has nothing to do with it, the Secret has.
    service.service.spec.jobs.limit = 9;
    assert!(service.step().is_empty());
    service.service.spec.registry.secret_name = Some("other".to_owned());
    assert_eq!(service.step(), ["run"]);
    assert_eq!(service.access().0, "Unknown");
    service.service.spec.registry = Default::default();
    assert_eq!(service.step(), ["stop"]);
    assert_eq!(service.access().1, "NothingToCheck");
}

#[test]
fn a_registry_that_says_no_is_told_and_asked_again() {
    for (problem, reason, advice) in [
        (Problem::NoLoginFile, "NoSecret", "is not there"),
        (
            Problem::Unauthorized,
            "Unauthorized",
            "h:5000 in the Secret login",
        ),
        (Problem::Unreachable, "Unreachable", "h:5000"),
    ] {
        let mut service = Service::new(json!({"secretName": "login"}));
        service.step();
        service.fail_job(problem);
        assert!(service.step().is_empty());
        let (is, why, message) = service.access();
        assert_eq!((&*is, &*why), ("False", reason));
        assert!(
            message.starts_with("it says no (") && message.contains(advice),
            "{message}"
        );
        assert!(message.contains("after 1 minutes"), "{message}");
        (service.pod, service.log) = (None, None);
        for _ in 0..59 {
            assert!(service.step().is_empty());
        }
        assert_eq!(service.step(), ["stop"]);
        assert_eq!(service.step(), ["run"]);
        // It is still said while it is asked again.
        assert_eq!(service.access().1, reason);
        service.end_job("Complete");
        service.step();
        assert_eq!(service.access().0, "True");
    }
}

#[test]
fn the_service_is_ready_only_with_logins_that_are_taken() {
    let mut service = Service::new(json!({"secretName": "login"}));
    let ready = |service: &mut Service| {
        service.step();
        let status = service.service.status.as_ref().unwrap();
        conditions::find(&status.conditions, "Ready")
            .unwrap()
            .clone()
    };
    assert_eq!(ready(&mut service).status, "Unknown");
    service.fail_job(Problem::Unauthorized);
    let said = ready(&mut service);
    assert_eq!((&*said.status, &*said.reason), ("False", ACCESS));
    assert!(said.message.starts_with("it says no"), "{said:?}");
    // The same is no change.
    assert_eq!(ready(&mut service), said);
    service.now += 60;
    (service.pod, service.log) = (None, None);
    ready(&mut service);
    ready(&mut service);
    service.end_job("Complete");
    assert_eq!(ready(&mut service).status, "True");
}

fn unread() -> Option<Ufs> {
    Some(Ufs::Unread("n1: UFS is not mounted at /u".to_owned()))
}

#[test]
fn ufs_that_goes_away_is_noticed_and_tried_until_it_is_back() {
    let mut service = Service::new(json!({"secretName": "login"}));
    service.pass();
    service.nodes = Some(Ufs::Read);
    assert_eq!(service.wait(10_000), (10_000, Vec::new()));
    service.nodes = unread();
    assert!(service.step().is_empty());
    let (is, why, message) = service.ufs();
    assert_eq!((&*is, &*why), ("Unknown", DOUBTED));
    let said = "the PersistentVolumeClaim ufs seems to be away: no node that can tell reads from it (n1: UFS is not mounted at /u)";
    assert!(message.starts_with(said), "{message}");
    let ready = |service: &Service| {
        let (is, why, what) = service.said("Ready");
        (is, why, what)
    };
    assert_eq!(
        ready(&service),
        ["Unknown", UFS_READY, &message].map(str::to_owned).into()
    );
    // Of registries nothing new is known.
    assert_eq!(service.access().0, "True");
    assert_eq!(service.step(), ["run"]);
    assert!(service.wait(100).1.is_empty(), "one at a time");
    assert_eq!(service.ufs().2, message);
    // Its pod cannot have it either.
    service.node_says(1, "MountVolume.SetUp failed for volume \"ufs\" : stale");
    service.step();
    assert_eq!(service.ufs_is(), "False NotMounted");
    assert_eq!(ready(&service).0, "False");
    // With each try that comes to nothing the next one comes later.
    let mut pauses = Vec::new();
    for _ in 0..8 {
        service.end_job("Failed");
        service.step();
        assert_eq!(service.ufs_is(), "False NotMounted");
        let (second, does) = service.wait(10_000);
        assert_eq!(does, ["stop"]);
        assert_eq!(service.step(), ["run"]);
        pauses.push(second);
    }
    assert_eq!(pauses, [60, 120, 240, 480, 960, 1920, 3600, 3600]);
    // Nodes can read again: so will a Job, and not only when its turn comes.
    service.end_job("Failed");
    service.step();
    service.wait(300);
    service.nodes = Some(Ufs::Read);
    assert_eq!(service.step(), ["stop"]);
    assert_eq!(service.step(), ["run"]);
    service.job_says(None);
    service.step();
    assert_eq!(service.ufs_is(), "True Tried");
    service.end_job("Complete");
    service.step();
    assert_eq!(ready(&service).0, "True");
    assert_eq!(service.step(), ["stop"]);
    assert_eq!(service.wait(10_000), (10_000, Vec::new()));
}

#[test]
fn a_try_for_nodes_that_are_back_counts_like_any_other_when_it_fails() {
    let mut service = Service::new(json!({}));
    service.pass();
    service.nodes = unread();
    service.wait(100);
    service.job_says(Some("no space left"));
    for failed in 0..4 {
        service.end_job("Failed");
        service.step();
        assert_eq!(service.ufs_is(), "False NotUsable");
        if failed == 1 {
            service.nodes = Some(Ufs::Read);
        }
        let pause = [60, 60, 240, 480][failed];
        assert_eq!(service.wait(10_000), (pause, vec!["stop"]));
        assert_eq!(service.step(), ["run"]);
    }
}

#[test]
fn what_is_wrong_with_nodes_alone_starts_jobs_seldom_and_changes_nothing() {
    let mut service = Service::new(json!({}));
    service.pass();
    let mut pauses = Vec::new();
    service.wait(100);
    service.nodes = unread();
    for round in 0..9 {
        let (second, does) = service.wait(10_000);
        assert_eq!(does, ["run"]);
        pauses.push(second);
        let expected = match round {
            0 => "Unknown Doubted",
            _ => "True JobsOnly",
        };
        assert_eq!(service.ufs_is(), expected);
        assert!(service.step().is_empty());
        service.job_says(None);
        service.end_job("Complete");
        service.step();
        assert_eq!(service.ufs_is(), "True JobsOnly");
        let message = service.ufs().2;
        assert!(message.contains("(n1: UFS is not mounted"), "{message}");
        assert_eq!(service.step(), ["stop"]);
        service.log = None;
    }
    // A look decides, and the next one makes the Job; two passed with its end.
    assert_eq!(pauses, [2, 60, 120, 240, 480, 960, 1920, 3600, 3600]);
    // Nobody has looked at nodes yet: a controller that has just begun.
    service.nodes = None;
    service.wait(10);
    assert_eq!(service.ufs_is(), "True JobsOnly");
    service.nodes = Some(Ufs::Read);
    service.step();
    assert_eq!(service.ufs_is(), "True Tried");
    // Nodes that come and go start no more of them.
    let mut begun = 0;
    for second in 0..20_000 {
        service.nodes = if second / 30 % 2 == 0 {
            unread()
        } else {
            Some(Ufs::Read)
        };
        if service.step() == ["run"] {
            begun += 1;
            service.end_job("Complete");
        }
    }
    assert!((5..10).contains(&begun), "{begun}");
    // After a time of calm it is believed at once again.
    service.nodes = Some(Ufs::Read);
    service.wait(5000);
    service.nodes = unread();
    service.step();
    assert_eq!(service.ufs_is(), "Unknown Doubted");
}

#[test]
fn a_task_that_cannot_use_ufs_has_it_tried_once() {
    let mut service = Service::new(json!({}));
    service.pass();
    service.nodes = Some(Ufs::Read);
    service.wait(100);
    service.trouble = Some(Trouble {
        at: Timestamp::from_second(service.now).unwrap(),
        what: "the Job of the task default/a cannot use it: no answer".to_owned(),
    });
    service.step();
    let (is, why, message) = service.ufs();
    assert_eq!((&*is, &*why), ("Unknown", DOUBTED));
    assert!(message.contains("default/a"), "{message}");
    assert_eq!(service.step(), ["run"]);
    service.end_job("Complete");
    service.step();
    assert_eq!(service.ufs_is(), "True Tried");
    assert_eq!(service.step(), ["stop"]);
    assert_eq!(service.wait(10_000), (10_000, Vec::new()));
}

#[test]
fn the_job_of_another_round_is_not_taken_for_this_ones() {
    let mut service = Service::new(json!({}));
    service.step();
    service.end_job("Complete");
    service.step();
    let old = service.jobs[0].clone();
    service.step();
    service.wait(100);
    service.nodes = unread();
    service.step();
    // Its pod is on a node that does not answer.
    let now = Timestamp::from_second(service.now).unwrap();
    service.jobs.push(old);
    service.jobs[0].metadata.deletion_timestamp = Some(Time(now));
    assert_eq!(service.step(), ["run"]);
    service.step();
    assert_eq!(service.ufs_is(), "Unknown Doubted");
}
