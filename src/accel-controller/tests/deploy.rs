//! What is checked in under `deploy/kubernetes`.

use accel_controller::resource::definitions_yaml;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

fn deploy() -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../deploy/kubernetes"
    ))
}

#[test]
fn the_definitions_are_those_of_the_types() {
    let directory = deploy().join("crds");
    let mut files: BTreeSet<_> = fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for (name, text) in definitions_yaml().unwrap() {
        let there = fs::read_to_string(directory.join(&name)).unwrap();
        assert!(
            there == text,
            "{name} is not what `accel-controller crds --out deploy/kubernetes/crds` writes"
        );
        files.remove(&name);
        // Servers before 1.25 have no rules, and would take anything.
        assert!(!text.contains("x-kubernetes-validations"), "{name}");
    }
    assert!(files.is_empty(), "nobody's: {files:?}");
}

/// Every grant: kind of the role, group, resource, verb, and why.
const GRANTS: &[(&str, &str, &str, &str, &str)] = &[
    (
        "ClusterRole",
        "image-accel.io",
        "acceleratedimages",
        "list",
        "tasks are in all namespaces",
    ),
    (
        "ClusterRole",
        "image-accel.io",
        "acceleratedimages",
        "watch",
        "to notice them",
    ),
    (
        "ClusterRole",
        "image-accel.io",
        "acceleratedimages",
        "patch",
        "the finalizer",
    ),
    (
        "ClusterRole",
        "image-accel.io",
        "acceleratedimages",
        "delete",
        "all of them, with a service that is purged",
    ),
    (
        "ClusterRole",
        "image-accel.io",
        "acceleratedimages/status",
        "patch",
        "phase and progress",
    ),
    (
        "ClusterRole",
        "image-accel.io",
        "imageaccelerations",
        "get",
        "whether acceleration is on",
    ),
    (
        "ClusterRole",
        "image-accel.io",
        "imageaccelerations",
        "list",
        "to notice that it is turned on",
    ),
    (
        "ClusterRole",
        "image-accel.io",
        "imageaccelerations",
        "watch",
        "the same",
    ),
    (
        "ClusterRole",
        "image-accel.io",
        "imageaccelerations",
        "patch",
        "the finalizer of one that is to be purged",
    ),
    (
        "ClusterRole",
        "image-accel.io",
        "imageaccelerations/status",
        "patch",
        "conditions and counts",
    ),
    (
        "ClusterRole",
        "",
        "nodes",
        "list",
        "which to label, and whether one that has been silent for long is still there",
    ),
    ("ClusterRole", "", "nodes", "patch", "the label"),
    (
        "ClusterRole",
        "",
        "namespaces",
        "get",
        "kube-system's UID: what the cluster is called on UFS",
    ),
    (
        "ClusterRole",
        "events.k8s.io",
        "events",
        "create",
        "beside the task, for changes of its phase",
    ),
    (
        "ClusterRole",
        "events.k8s.io",
        "events",
        "patch",
        "the same one again",
    ),
    (
        "Role",
        "batch",
        "jobs",
        "list",
        "those of a task, and how many are at work",
    ),
    ("Role", "batch", "jobs", "watch", "to notice their end"),
    (
        "Role",
        "batch",
        "jobs",
        "create",
        "a new one: server-side apply needs both",
    ),
    (
        "Role",
        "batch",
        "jobs",
        "patch",
        "a new one: server-side apply needs both",
    ),
    (
        "Role",
        "batch",
        "jobs",
        "delete",
        "those that are done with",
    ),
    (
        "Role",
        "",
        "pods",
        "list",
        "why a Job's pod does not start, or how it ended",
    ),
    (
        "Role",
        "",
        "pods/log",
        "get",
        "how far the work is, and its result",
    ),
    (
        "Role",
        "",
        "events",
        "list",
        "why UFS cannot be mounted: a pod that waits for a volume does not say it",
    ),
    (
        "Role",
        "",
        "secrets",
        "create",
        "the copy of a task's own, for its Job; none can be read without its namespace's leave",
    ),
    (
        "Role",
        "",
        "persistentvolumeclaims",
        "get",
        "whether UFS has a volume",
    ),
    (
        "Role",
        "coordination.k8s.io",
        "leases",
        "list",
        "how nodes are",
    ),
    (
        "Role",
        "coordination.k8s.io",
        "leases",
        "get",
        "one controller at a time",
    ),
    (
        "Role",
        "coordination.k8s.io",
        "leases",
        "create",
        "one controller at a time",
    ),
    (
        "Role",
        "coordination.k8s.io",
        "leases",
        "update",
        "one controller at a time",
    ),
];

#[test]
fn the_controller_may_do_what_it_has_a_reason_for_and_nothing_else() {
    let text = fs::read_to_string(deploy().join("rbac.yaml")).unwrap();
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    let mut granted = BTreeSet::new();
    for role in &documents {
        let kind = role["kind"].as_str().unwrap();
        for rule in role["rules"].as_array().into_iter().flatten() {
            let all = |key: &str| -> Vec<String> {
                let words = rule[key].as_array().unwrap().iter();
                words
                    .map(|word| word.as_str().unwrap().to_owned())
                    .collect()
            };
            for group in all("apiGroups") {
                for resource in all("resources") {
                    // One object of all the cluster's.
                    if resource == "namespaces" {
                        assert_eq!(all("resourceNames"), ["kube-system"]);
                    }
                    for verb in all("verbs") {
                        granted.insert([kind.to_owned(), group.clone(), resource.clone(), verb]);
                    }
                }
            }
        }
    }
    let reasons: BTreeSet<_> = GRANTS
        .iter()
        .map(|(kind, group, resource, verb, _)| {
            [kind, group, resource, verb].map(|word| (*word).to_owned())
        })
        .collect();
    assert_eq!(granted, reasons);
}
