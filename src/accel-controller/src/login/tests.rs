use super::*;
use serde_json::Value;

/// A service, and the Jobs that ask for it.
struct Service {
    service: ImageAcceleration,
    jobs: Vec<Job>,
    pod: Option<Pod>,
    log: Option<Result<Output, String>>,
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
            settings: &settings,
            now,
        });
        tell(&checked, &mut self.service, now);
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

    fn access(&self) -> (String, String, String) {
        let status = self.service.status.as_ref().unwrap();
        let access = conditions::find(&status.conditions, ACCESS).unwrap();
        (
            access.status.clone(),
            access.reason.clone(),
            access.message.clone(),
        )
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
        self.log = Some(Ok(Output {
            refused: Some(Refused {
                registry: "h:5000".to_owned(),
                problem,
            }),
            ..Output::default()
        }));
    }
}

#[test]
fn without_a_secret_there_is_nothing_to_ask() {
    let mut service = Service::new(json!({}));
    assert!(service.step().is_empty());
    assert_eq!(service.access().0, "True");
    assert_eq!(service.access().1, "NothingToCheck");
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
        "h:5000",
        "--registry-config",
        "/login/config.json",
    ];
    assert_eq!(pod["containers"][0]["args"], json!(arguments));
    // It writes nothing, and goes with the service.
    let names: Vec<_> = pod["volumes"].as_array().unwrap().iter().collect();
    assert_eq!(names.len(), 1);
    assert_eq!(names[0]["secret"]["secretName"], "login");
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
    assert_eq!(service.access().0, "True");
    assert_eq!(service.service.status.unwrap().check, None);
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
    let claim = json!({"metadata": {"name": "ufs"}, "status": {"phase": "Bound"}});
    let claim = serde_json::from_value(claim).unwrap();
    let mut service = Service::new(json!({"secretName": "login"}));
    let ready = |service: &mut Service| {
        service.step();
        let now = Timestamp::from_second(service.now).unwrap();
        let status = crate::service::status(&service.service, Some(&claim), [], None, now);
        service.service.status = Some(status.clone());
        conditions::find(&status.conditions, "Ready")
            .unwrap()
            .clone()
    };
    assert_eq!(ready(&mut service).status, "Unknown");
    service.fail_job(Problem::Unauthorized);
    let said = ready(&mut service);
    assert_eq!((&*said.status, &*said.reason), ("False", ACCESS));
    assert!(said.message.starts_with("it says no"));
    // The same is no change.
    assert_eq!(ready(&mut service), said);
    service.now += 60;
    (service.pod, service.log) = (None, None);
    ready(&mut service);
    ready(&mut service);
    service.end_job("Complete");
    assert_eq!(ready(&mut service).status, "True");
}

#[test]
fn a_copy_has_the_logins_and_is_taken_whatever_is_in_them() {
    let secret = json!({"metadata": {"name": "mine", "namespace": "team"}, "type": SECRET_TYPE,
        "data": {".dockerconfigjson": "bm8ganNvbg==", "other": "eA=="}});
    let owner: OwnerReference = serde_json::from_value(
        json!({"apiVersion": "batch/v1", "kind": "Job", "name": "accel-u-1-0", "uid": "j"}),
    )
    .unwrap();
    let copy = copy(serde_json::from_value(secret).unwrap(), owner);
    let copy = serde_json::to_value(copy).unwrap();
    assert_eq!(copy["metadata"]["name"], "accel-u-1-0");
    assert_eq!(copy["metadata"]["ownerReferences"][0]["uid"], "j");
    assert_eq!(copy["type"], "Opaque");
    assert_eq!(copy["data"], json!({".dockerconfigjson": "bm8ganNvbg=="}));
}

#[test]
fn a_namespace_lets_the_controller_read_one_secret_and_nothing_else() {
    let text = access("image-accel", "team", "mine").unwrap();
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    assert_eq!(documents.len(), 2);
    let expected = json!([{"apiGroups": [""], "resources": ["secrets"],
        "resourceNames": ["mine"], "verbs": ["get"]}]);
    assert_eq!(documents[0]["rules"], expected);
    for document in &documents {
        assert_eq!(document["metadata"]["namespace"], "team");
    }
    assert_eq!(
        documents[1]["roleRef"]["name"],
        documents[0]["metadata"]["name"]
    );
    assert_eq!(documents[1]["subjects"][0]["namespace"], "image-accel");
}
