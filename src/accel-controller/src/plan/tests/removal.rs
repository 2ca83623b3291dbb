//! Tasks that are being deleted.

use super::*;

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
    assert!(cluster.status().waits_for_nodes.is_empty());
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
    let said = cluster.plan().ufs_fails.unwrap();
    assert!(said.starts_with("cannot open /ufs (UFS"), "{said}");
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
    waiting_pod(&mut cluster, 10, "ContainerCreating");
    assert_eq!(cluster.plan().ufs_fails, None);
    waiting_pod(&mut cluster, 120, "ContainerCreating");
    assert!(cluster.plan().ufs_fails.is_some());
    cluster.end_job("Failed", "DeadlineExceeded");
    cluster.pod_says(&json!({"waiting": {"reason": "ContainerCreating"}}));
    let said = cluster.plan().ufs_fails.unwrap();
    assert!(said.starts_with("UFS does not answer"), "{said}");
    cluster.step();
    let (phase, message) = cluster.phase();
    assert_eq!(phase, Phase::DeleteError);
    assert!(message.starts_with("UFS does not answer"), "{message}");
    assert!(message.contains("after 30 s"), "{message}");
}
