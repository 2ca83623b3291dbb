//! What Jobs may do, and what they get.

use super::*;

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
