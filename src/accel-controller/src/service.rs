//! What is said of the service, as a pure function of what is observed.

use crate::check::{Checked, Said, UFS_READY};
use crate::conditions;
use crate::labels::{LABELLING, Looked};
use crate::login::ACCESS;
use crate::obstacles::CONTROLLER_READY;
use crate::report;
use crate::resource::{
    AcceleratedImage, ImageAcceleration, ImageAccelerationStatus, Phase, UfsSpec, UfsVolume,
};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::jiff::Timestamp;

/// The reason of [`UFS_READY`] while the claim waits for a volume.
pub const NOT_BOUND: &str = "NotBound";

/// What is said of the controller that leads and is called `identity`; `obstacle` is what keeps
/// it from its work, as a reason and in words.
pub fn controller(identity: &str, obstacle: Option<(&'static str, &str)>) -> Said {
    match obstacle {
        Some((reason, what)) => Said::new("False", reason, format!("{identity}: {what}")),
        None => Said::new("True", "Leads", format!("{identity} leads")),
    }
}

/// Puts a condition into the status.
pub fn say(
    status: &mut ImageAccelerationStatus,
    service: &ImageAcceleration,
    type_: &str,
    said: &Said,
    now: Timestamp,
) {
    let says = [type_, said.status, &said.reason, &said.message];
    let generation = service.metadata.generation;
    conditions::set(&mut status.conditions, says, generation, now);
}

/// The status of a service of which nothing else can be said than that something keeps the
/// controller from its work; none if that is not so. All the rest is as it was said last.
pub fn hindered(
    service: &ImageAcceleration,
    controller: &Said,
    now: Timestamp,
) -> Option<ImageAccelerationStatus> {
    if controller.status != "False" {
        return None;
    }
    let mut status = service.status.clone().unwrap_or_default();
    say(&mut status, service, CONTROLLER_READY, controller, now);
    // One that is deleted is not Ready for another reason.
    if service.metadata.deletion_timestamp.is_none() {
        let ready = Said::new("False", CONTROLLER_READY, controller.message.clone());
        say(&mut status, service, "Ready", &ready, now);
    }
    Some(status)
}

/// The service's status. `controller` is what [`controller`] gives; `checked` is what a look at its check has come to; `claim` is the one
/// that it names, if there is one; `nodes` is what came of the last look at the nodes, if there
/// was one.
pub fn status<'a>(
    service: &ImageAcceleration,
    controller: &Said,
    checked: &Checked,
    claim: Option<&PersistentVolumeClaim>,
    tasks: impl IntoIterator<Item = &'a AcceleratedImage>,
    nodes: Option<&Looked>,
    now: Timestamp,
) -> ImageAccelerationStatus {
    let mut status = service.status.clone().unwrap_or_default();
    // What an older version called UfsReady; nobody would change it any more.
    status.conditions.retain(|said| said.type_ != "UfsBound");
    status.check = Some(checked.check.clone());
    // A Job may try what the claim cannot have yet.
    let unbound = unbound(&service.spec.ufs, claim);
    let unbound = unbound.map(|(reason, message)| Said::new("False", reason, message));
    let (ufs, access) = (unbound.unwrap_or(checked.ufs.clone()), &checked.access);
    let worst = [
        (CONTROLLER_READY, controller),
        (UFS_READY, &ufs),
        (ACCESS, access),
    ];
    let first = |is: &str| worst.into_iter().find(|(_, said)| said.status == is);
    let ready = match first("False").or_else(|| first("Unknown")) {
        Some((type_, said)) => Said::new(said.status, type_, said.message.clone()),
        None => {
            let what = "nothing is known that keeps tasks from being converted";
            Said::new("True", "Working", what)
        }
    };
    let labelling = nodes.map(|nodes| match &nodes.refused {
        Some(refused) => Said::new("False", "Refused", refused.clone()),
        None => {
            let what = "nodes have the label exactly while they can serve";
            Said::new("True", "Labelled", what)
        }
    });
    let labelling = labelling.as_ref().map(|said| (LABELLING, said));
    let all = worst.into_iter().chain([("Ready", &ready)]);
    for (type_, said) in all.chain(labelling) {
        say(&mut status, service, type_, said, now);
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

/// Why no Job can have UFS, if that can be seen without one: a condition's reason and message.
fn unbound(ufs: &UfsSpec, claim: Option<&PersistentVolumeClaim>) -> Option<(&'static str, String)> {
    let name = match ufs.place() {
        Some(UfsVolume::Claim(name)) => name,
        // Whether it is there a Job tells.
        Some(UfsVolume::Nfs(..) | UfsVolume::HostPath(_)) => return None,
        None => {
            let what = "spec.ufs has to name one of claimName, nfs and hostPath";
            return Some(("NoUfs", what.to_owned()));
        }
    };
    let Some(claim) = claim else {
        let what =
            format!("there is no PersistentVolumeClaim {name} in the controller's namespace");
        return Some(("NoClaim", what));
    };
    let phase = claim
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    match phase {
        Some("Bound") => None,
        phase => {
            let phase = phase.unwrap_or("Pending");
            // Some are bound with the first pod.
            let what = format!("the PersistentVolumeClaim {name} is {phase}");
            Some((NOT_BOUND, what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::Ufs;
    use crate::resource::{AcceleratedImageStatus, CheckStatus};
    use serde_json::json;
    use std::sync::LazyLock;

    static LEADS: LazyLock<Said> = LazyLock::new(|| controller("one", None));

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
            ufs: Ufs::Read,
            refused: Some("n1: no".to_owned()),
        };
        let said = |is| Said::new(is, "Why", "what a Job says");
        let checked = |ufs, access| Checked {
            ufs: said(ufs),
            access: said(access),
            check: CheckStatus::default(),
            steps: Vec::new(),
            again: None,
        };
        let good = checked("True", "True");
        let first = status(&service, &LEADS, &good, None, &tasks, Some(&looked), at(1));
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
        // UFS comes first, and what is wrong before what is not known.
        for (ufs, access, is, why) in [
            ("Unknown", "Unknown", "Unknown", UFS_READY),
            ("True", "Unknown", "Unknown", ACCESS),
            ("True", "True", "True", "Working"),
            ("Unknown", "False", "False", ACCESS),
            ("False", "False", "False", UFS_READY),
        ] {
            let checked = checked(ufs, access);
            let status = status(
                &service,
                &LEADS,
                &checked,
                Some(&claim("Bound")),
                &tasks,
                None,
                at(1),
            );
            let said = ready(&status);
            assert_eq!((&*said.status, &*said.reason), (is, why));
            let ufs_said = conditions::find(&status.conditions, UFS_READY).unwrap();
            assert_eq!(ufs_said.status, ufs);
            if is == "False" {
                assert_eq!(said.message, "what a Job says");
            }
        }
        // What the claim cannot have yet a Job may have tried: of UFS one thing is said.
        let pending = status(
            &service,
            &LEADS,
            &good,
            Some(&claim("Pending")),
            &tasks,
            None,
            at(2),
        );
        let ufs = conditions::find(&pending.conditions, UFS_READY).unwrap();
        assert_eq!((&*ufs.status, &*ufs.reason), ("False", NOT_BOUND));
        assert_eq!(ufs.last_transition_time.0, at(1));
        assert_eq!(ready(&pending).last_transition_time.0, at(1));
        looked = Looked {
            nodes: 2,
            ready: 2,
            ufs: Ufs::Read,
            refused: None,
        };
        let bound = status(
            &service,
            &LEADS,
            &good,
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
    fn of_what_is_no_claim_a_job_tells_whether_it_is_there() {
        for given in [
            json!({"nfs": {"server": "h", "path": "/e"}}),
            json!({"hostPath": "/mnt/ufs"}),
        ] {
            let given: UfsSpec = serde_json::from_value(given).unwrap();
            assert_eq!(unbound(&given, None), None);
        }
        let claims = UfsSpec {
            claim_name: Some("ufs".to_owned()),
            ..UfsSpec::default()
        };
        let reason = |ufs: &UfsSpec, claim: Option<&PersistentVolumeClaim>| {
            unbound(ufs, claim).map(|(reason, _)| reason)
        };
        assert_eq!(reason(&UfsSpec::default(), None), Some("NoUfs"));
        assert_eq!(reason(&claims, None), Some("NoClaim"));
        assert_eq!(reason(&claims, Some(&claim("Pending"))), Some(NOT_BOUND));
        assert_eq!(reason(&claims, Some(&claim("Bound"))), None);
    }

    #[test]
    fn what_keeps_the_controller_from_its_work_is_said_first_and_although_nothing_else_can_be() {
        let mut service: ImageAcceleration = serde_json::from_value(json!({
            "apiVersion": "image-accel.io/v1alpha1", "kind": "ImageAcceleration",
            "metadata": {"name": "cluster", "generation": 2},
            "spec": {"ufs": {"hostPath": "/ufs"}},
        }))
        .unwrap();
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let is = |status: &ImageAccelerationStatus, type_: &str| {
            let found = conditions::find(&status.conditions, type_).unwrap();
            [&found.status, &found.reason, &found.message].map(Clone::clone)
        };
        let hinders = controller("two", Some(("CannotWatch", "it is forbidden")));
        let unusable = Said::new("False", "NotUsable", "what a Job says");
        let checked = Checked {
            ufs: unusable.clone(),
            access: unusable,
            check: CheckStatus::default(),
            steps: Vec::new(),
            again: None,
        };
        let leads = status(&service, &LEADS, &checked, None, [], None, at(1));
        assert_eq!(is(&leads, CONTROLLER_READY), ["True", "Leads", "one leads"]);
        assert_eq!(is(&leads, "Ready"), ["False", UFS_READY, "what a Job says"]);
        let what = "two: it is forbidden";
        let cannot = status(&service, &hinders, &checked, None, [], None, at(1));
        assert_eq!(
            is(&cannot, CONTROLLER_READY),
            ["False", "CannotWatch", what]
        );
        assert_eq!(is(&cannot, "Ready"), ["False", CONTROLLER_READY, what]);

        assert_eq!(hindered(&service, &LEADS, at(2)), None);
        service.status = Some(leads);
        let told = hindered(&service, &hinders, at(2)).unwrap();
        assert_eq!(is(&told, CONTROLLER_READY), ["False", "CannotWatch", what]);
        assert_eq!(is(&told, "Ready"), ["False", CONTROLLER_READY, what]);
        assert_eq!(is(&told, UFS_READY)[1], "NotUsable", "as it was said last");
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(2));
        service.metadata.deletion_timestamp = Some(now);
        let told = hindered(&service, &hinders, at(2)).unwrap();
        assert_eq!(is(&told, CONTROLLER_READY)[0], "False");
        assert_eq!(is(&told, "Ready")[1], UFS_READY);
    }
}
