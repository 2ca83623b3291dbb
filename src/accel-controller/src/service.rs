//! What is said of the service, as a pure function of what is observed.

use crate::conditions;
use crate::labels::{LABELLING, Looked};
use crate::login::ACCESS;
use crate::report;
use crate::resource::{
    AcceleratedImage, ImageAcceleration, ImageAccelerationStatus, Phase, UfsSpec, UfsVolume,
};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::jiff::Timestamp;

/// The service's status. `claim` is the one that it names, if there is one; `nodes` is what came
/// of the last look at the nodes, if there was one.
pub fn status<'a>(
    service: &ImageAcceleration,
    claim: Option<&PersistentVolumeClaim>,
    tasks: impl IntoIterator<Item = &'a AcceleratedImage>,
    nodes: Option<&Looked>,
    now: Timestamp,
) -> ImageAccelerationStatus {
    let mut status = service.status.clone().unwrap_or_default();
    let (bound, reason, message) = ufs(&service.spec.ufs, claim);
    // That a Job could not mount it the Job tells.
    let working = match bound {
        "Unknown" => format!("{message}, which nobody has tried yet"),
        _ => "nothing is known that keeps tasks from being converted".to_owned(),
    };
    let generation = service.metadata.generation;
    // Whoever asks registries has said it already, but perhaps of other settings.
    let access = conditions::find(&status.conditions, ACCESS);
    let access = access.filter(|condition| condition.observed_generation == generation);
    let access = access.map(|condition| (&*condition.status, condition.message.clone()));
    let unknown = "whether registries take the logins is not known yet";
    let (is_ready, why, ready) = match (bound, access) {
        ("False", _) => ("False", "UfsNotBound", message.clone()),
        (_, Some(("True", _))) => ("True", "Working", working),
        (_, Some(("False", message))) => ("False", ACCESS, message),
        (_, Some((_, message))) => ("Unknown", ACCESS, message),
        (_, None) => ("Unknown", ACCESS, unknown.to_owned()),
    };
    let labelling = nodes.map(|nodes| match &nodes.refused {
        Some(refused) => (LABELLING, "False", "Refused", refused.clone()),
        None => {
            let what = "nodes have the label exactly while they can serve".to_owned();
            (LABELLING, "True", "Labelled", what)
        }
    });
    let all = [
        ("UfsBound", bound, reason, message),
        ("Ready", is_ready, why, ready),
    ];
    for (type_, is, reason, message) in all.into_iter().chain(labelling) {
        let says = [type_, is, reason, &message];
        conditions::set(&mut status.conditions, says, generation, now);
    }
    (status.images, status.stored_bytes) = (0, 0);
    for task in tasks {
        if let Some(of) = (task.status.as_ref()).filter(|of| of.phase == Phase::Ready) {
            status.images = status.images.saturating_add(1);
            let bytes = of.stored_bytes.unwrap_or_default();
            status.stored_bytes = status.stored_bytes.saturating_add(bytes);
        }
    }
    status.stored = report::bytes(status.stored_bytes);
    if let Some(Looked { nodes, ready, .. }) = nodes {
        (status.nodes_ready, status.nodes) = (*ready, *nodes);
        status.nodes_text = format!("{ready}/{nodes}");
    }
    status
}

/// Whether UFS can be had: a condition's status, reason and message.
fn ufs(
    ufs: &UfsSpec,
    claim: Option<&PersistentVolumeClaim>,
) -> (&'static str, &'static str, String) {
    let name = match ufs.place() {
        Some(UfsVolume::Claim(name)) => name,
        // Whether it is there the Jobs tell.
        Some(UfsVolume::Nfs(server, path)) => {
            return ("Unknown", "Nfs", format!("Jobs mount {server}:{path}"));
        }
        Some(UfsVolume::HostPath(path)) => {
            let what = format!("Jobs get {path} of their nodes");
            return ("Unknown", "HostPath", what);
        }
        None => {
            let what = "spec.ufs has to name one of claimName, nfs and hostPath";
            return ("False", "NoUfs", what.to_owned());
        }
    };
    let Some(claim) = claim else {
        let what =
            format!("there is no PersistentVolumeClaim {name} in the controller's namespace");
        return ("False", "NoClaim", what);
    };
    let phase = claim
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    match phase {
        Some("Bound") => ("True", "Bound", format!("{name} has a volume")),
        phase => {
            let phase = phase.unwrap_or("Pending");
            // Some are bound with the first pod.
            let what = format!("the PersistentVolumeClaim {name} is {phase}");
            ("False", "NotBound", what)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::AcceleratedImageStatus;
    use serde_json::json;

    fn claim(phase: &str) -> PersistentVolumeClaim {
        serde_json::from_value(json!({"metadata": {"name": "ufs"}, "status": {"phase": phase}}))
            .unwrap()
    }

    #[test]
    fn it_is_ready_when_the_claim_has_a_volume_and_counts_what_is_ready() {
        let mut service: ImageAcceleration = serde_json::from_value(json!({
            "apiVersion": "image-accel.io/v1alpha1", "kind": "ImageAcceleration",
            "metadata": {"name": "cluster", "generation": 2},
            "spec": {"ufs": {"claimName": "ufs"}},
        }))
        .unwrap();
        let task = |phase, stored_bytes| {
            let mut task = AcceleratedImage::new(
                "a",
                serde_json::from_value(json!({"source": "h/a"})).unwrap(),
            );
            task.status = Some(AcceleratedImageStatus {
                phase,
                stored_bytes: Some(stored_bytes),
                ..AcceleratedImageStatus::default()
            });
            task
        };
        let tasks = [
            task(Phase::Ready, 1 << 20),
            task(Phase::Ready, 2 << 20),
            task(Phase::Creating, 4 << 20),
        ];
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let ready = |status: &ImageAccelerationStatus| {
            conditions::find(&status.conditions, "Ready")
                .unwrap()
                .clone()
        };
        let mut looked = Looked {
            nodes: 2,
            ready: 1,
            refused: Some("n1: no".to_owned()),
        };
        let first = status(&service, None, &tasks, Some(&looked), at(1));
        let labelling = |status: &ImageAccelerationStatus| {
            let found = conditions::find(&status.conditions, LABELLING).unwrap();
            (found.status.clone(), found.message.clone())
        };
        assert_eq!(labelling(&first), ("False".to_owned(), "n1: no".to_owned()));
        assert_eq!(ready(&first).status, "False");
        assert!(
            ready(&first)
                .message
                .contains("no PersistentVolumeClaim ufs")
        );
        assert_eq!((first.images, first.stored.as_str()), (2, "3.0 MiB"));

        service.status = Some(first);
        // Nothing is Ready of which nobody knows whether its logins are taken.
        let asked = status(&service, Some(&claim("Bound")), &tasks, None, at(1));
        assert_eq!(ready(&asked).status, "Unknown");
        let access = [ACCESS, "True", "Checked", ""];
        let said = &mut service.status.as_mut().unwrap().conditions;
        conditions::set(said, access, Some(1), at(1));
        let old = status(&service, Some(&claim("Bound")), &tasks, None, at(1));
        assert_eq!(ready(&old).status, "Unknown", "that was of other settings");
        let said = &mut service.status.as_mut().unwrap().conditions;
        conditions::set(said, access, Some(2), at(1));
        let pending = status(&service, Some(&claim("Pending")), &tasks, None, at(2));
        assert_eq!(ready(&pending).last_transition_time.0, at(1));
        looked = Looked {
            nodes: 2,
            ready: 2,
            refused: None,
        };
        let bound = status(
            &service,
            Some(&claim("Bound")),
            &tasks,
            Some(&looked),
            at(3),
        );
        assert_eq!(labelling(&bound).0, "True");
        assert_eq!(ready(&bound).status, "True");
        assert_eq!(ready(&bound).last_transition_time.0, at(3));
        assert_eq!(ready(&bound).observed_generation, Some(2));
        assert_eq!(
            (pending.nodes_text.as_str(), bound.nodes_text.as_str()),
            ("1/2", "2/2")
        );
    }

    #[test]
    fn ufs_that_is_no_claim_is_the_jobs_business() {
        for (given, reason, said) in [
            (json!({"nfs": {"server": "h", "path": "/e"}}), "Nfs", "h:/e"),
            (json!({"hostPath": "/mnt/ufs"}), "HostPath", "/mnt/ufs"),
        ] {
            let given: UfsSpec = serde_json::from_value(given).unwrap();
            let (bound, why, message) = ufs(&given, None);
            assert!(message.contains(said), "{message}");
            // Nobody has looked at it.
            assert_eq!((bound, why), ("Unknown", reason));
        }
        assert_eq!(ufs(&UfsSpec::default(), None).0, "False");
    }
}
