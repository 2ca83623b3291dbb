//! Registries, and the Secrets for them.

use super::*;

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
        let (said, stuck) = not_taken(&cluster.task, status, &step, "no more Secrets", now);
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
    let (_, stuck) = not_taken(&plain.task, plain.status().clone(), &step, "", now);
    assert_eq!(stuck, None);
}
