//! Turning acceleration off for good: all that was made goes with the service, as a pure
//! function of what is observed.
//!
//! Each task is deleted, and removes what it made as always; the service stays until the last
//! of them is gone, because their Jobs need what it says.

use crate::conditions;
use crate::plan::{IN_USE, is_kept};
use crate::resource::{AcceleratedImage, ImageAcceleration, ImageAccelerationStatus, Phase};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;

/// The condition of a service that goes only with all that was made.
pub const PURGED: &str = "Purged";

/// What has to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Keep the service until nothing is left.
    AddFinalizer,
    /// Let it go.
    RemoveFinalizer,
    /// Delete the task of that name in that namespace, and this UID.
    Delete {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// And not another one's.
        uid: Option<String>,
    },
}

/// Whether the service counts for a task: not once it is deleted, but for what is removed with
/// it.
pub fn serves(service: &ImageAcceleration, task: &AcceleratedImage) -> bool {
    let deleted = |of: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta| {
        of.deletion_timestamp.is_some()
    };
    !deleted(&service.metadata) || (service.spec.purge && deleted(&task.metadata))
}

/// Decides.
pub fn plan(service: &ImageAcceleration, tasks: &[AcceleratedImage]) -> Vec<Step> {
    let kept = is_kept(service);
    let Some(Time(deleted)) = &service.metadata.deletion_timestamp else {
        return match (service.spec.purge, kept) {
            (true, false) => vec![Step::AddFinalizer],
            (false, true) => vec![Step::RemoveFinalizer],
            _ => Vec::new(),
        };
    };
    if !kept {
        return Vec::new();
    }
    let left: Vec<_> = of_it(tasks, *deleted).collect();
    if left.is_empty() || !service.spec.purge {
        return vec![Step::RemoveFinalizer];
    }
    let there = left
        .into_iter()
        .filter(|task| task.metadata.deletion_timestamp.is_none());
    let delete = |task: &AcceleratedImage| Step::Delete {
        namespace: task.namespace().unwrap_or_default(),
        name: task.name_any(),
        uid: task.uid(),
    };
    there.map(delete).collect()
}

/// Tasks that were there when the service was deleted: later ones have made nothing, and wait.
fn of_it(
    tasks: &[AcceleratedImage],
    deleted: Timestamp,
) -> impl Iterator<Item = &AcceleratedImage> {
    let is_older = move |task: &&AcceleratedImage| {
        let made = task.creation_timestamp();
        made.is_none_or(|Time(made)| made <= deleted)
    };
    tasks.iter().filter(is_older)
}

/// Says in the status of a service that is deleted what is still waited for.
pub fn tell(
    status: &mut ImageAccelerationStatus,
    service: &ImageAcceleration,
    tasks: &[AcceleratedImage],
    now: Timestamp,
) {
    let Some(Time(deleted)) = &service.metadata.deletion_timestamp else {
        return;
    };
    let left: Vec<_> = of_it(tasks, *deleted).collect();
    let (mut used, mut failed) = (Vec::new(), Vec::new());
    for task in &left {
        let Some(status) = &task.status else { continue };
        let name = format!(
            "{}/{}",
            task.namespace().unwrap_or_default(),
            task.name_any()
        );
        if conditions::is_true(&status.conditions, IN_USE) {
            used.push(name);
        } else if status.phase == Phase::DeleteError {
            failed.push(name);
        }
    }
    let mut message = format!("{} tasks are left", left.len());
    for (names, what) in [(used, "in use"), (failed, "cannot be removed")] {
        if !names.is_empty() {
            message = format!("{message}; {what}: {}", some(&names, names.len()));
        }
    }
    let ready = "acceleration is being turned off, and what was made is being removed";
    for (type_, message) in [(PURGED, &*message), ("Ready", ready)] {
        let says = [type_, "False", "Purging", message];
        let generation = service.metadata.generation;
        conditions::set(&mut status.conditions, says, generation, now);
    }
    // None is meant any more, and they have lost the label.
    (status.nodes, status.nodes_ready) = (0, 0);
    status.nodes_text = "0/0".to_owned();
}

/// The first few of them, of which there are so many in all.
pub(crate) fn some(names: &[String], all: usize) -> String {
    const SHOWN: usize = 5;
    let shown = &names[..names.len().min(SHOWN)];
    match all.saturating_sub(shown.len()) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::FINALIZER;
    use serde_json::{Value, json};

    fn service(purge: bool, metadata: Value) -> ImageAcceleration {
        let mut service = json!({
            "apiVersion": "image-accel.io/v1alpha1", "kind": "ImageAcceleration",
            "spec": {"ufs": {"claimName": "ufs"}, "purge": purge},
        });
        service["metadata"] = metadata;
        service["metadata"]["name"] = json!("cluster");
        serde_json::from_value(service).unwrap()
    }

    fn task(name: &str, metadata: Value, status: Value) -> AcceleratedImage {
        let mut task = json!({
            "apiVersion": "image-accel.io/v1alpha1", "kind": "AcceleratedImage",
            "spec": {"source": "h/a"},
        });
        (task["metadata"], task["status"]) = (metadata, status);
        task["metadata"]["name"] = json!(name);
        task["metadata"]["namespace"] = json!("team");
        serde_json::from_value(task).unwrap()
    }

    const BEFORE: &str = "2026-01-01T00:00:00Z";
    const DELETED: &str = "2026-01-01T00:01:00Z";
    const AFTER: &str = "2026-01-01T00:02:00Z";

    fn going(purge: bool) -> ImageAcceleration {
        service(
            purge,
            json!({"deletionTimestamp": DELETED, "finalizers": [FINALIZER]}),
        )
    }

    #[test]
    fn it_is_kept_exactly_while_something_has_to_go_with_it() {
        let kept = json!({"finalizers": [FINALIZER]});
        for (purge, metadata, steps) in [
            (false, json!({}), vec![]),
            (true, json!({}), vec![Step::AddFinalizer]),
            (true, kept.clone(), vec![]),
            (false, kept, vec![Step::RemoveFinalizer]),
        ] {
            assert_eq!(plan(&service(purge, metadata), &[]), steps);
        }
        let one = [task("a", json!({"creationTimestamp": BEFORE}), json!({}))];
        // Without purge what was made stays, also if that is said in the middle of it.
        assert_eq!(plan(&going(false), &one), [Step::RemoveFinalizer]);
        assert_eq!(plan(&going(true), &[]), [Step::RemoveFinalizer]);
        let gone = service(true, json!({"deletionTimestamp": DELETED}));
        assert_eq!(plan(&gone, &one), []);
    }

    #[test]
    fn tasks_are_deleted_and_waited_for_but_not_those_that_came_later() {
        let old = |name: &str, more: Value| {
            let mut metadata = json!({"creationTimestamp": BEFORE, "uid": "u"});
            metadata
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            task(name, metadata, json!({}))
        };
        let later = task("later", json!({"creationTimestamp": AFTER}), json!({}));
        let mut tasks = vec![
            old("a", json!({})),
            old("b", json!({"deletionTimestamp": DELETED})),
            later,
        ];
        let delete = Step::Delete {
            namespace: "team".to_owned(),
            name: "a".to_owned(),
            uid: Some("u".to_owned()),
        };
        assert_eq!(plan(&going(true), &tasks), [delete]);
        tasks.remove(0);
        assert_eq!(plan(&going(true), &tasks), []);
        tasks.remove(0);
        assert_eq!(plan(&going(true), &tasks), [Step::RemoveFinalizer]);
        // Those that are deleted need the service still; others never.
        let deleted = old("b", json!({"deletionTimestamp": DELETED}));
        assert!(serves(&going(true), &deleted));
        assert!(!serves(&going(true), &tasks[0]));
        assert!(!serves(&going(false), &deleted));
        assert!(serves(&service(false, json!({})), &tasks[0]));
    }

    #[test]
    fn it_says_what_is_waited_for() {
        let now = Timestamp::UNIX_EPOCH;
        let made = json!({"creationTimestamp": BEFORE, "deletionTimestamp": DELETED});
        let in_use = json!({"phase": "Deleting", "conditions": [{"type": "InUse", "status": "True",
            "reason": "", "message": "", "lastTransitionTime": BEFORE}]});
        let tasks = [
            task("a", made.clone(), in_use),
            task("b", made.clone(), json!({"phase": "DeleteError"})),
            task("c", made, json!({"phase": "Deleting"})),
        ];
        let mut status = ImageAccelerationStatus {
            nodes: 3,
            nodes_ready: 2,
            nodes_text: "2/3".to_owned(),
            ..ImageAccelerationStatus::default()
        };
        tell(&mut status, &going(true), &tasks, now);
        let said = "3 tasks are left; in use: team/a; cannot be removed: team/b";
        assert_eq!(status.conditions[0].message, said);
        let ready = &status.conditions[1];
        assert_eq!((&*ready.type_, &*ready.status), ("Ready", "False"));
        assert_eq!(ready.reason, "Purging");
        let nodes = (status.nodes, status.nodes_ready, &*status.nodes_text);
        assert_eq!(nodes, (0, 0, "0/0"));
    }
}
