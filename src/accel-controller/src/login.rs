//! Logins for registries: which Secret counts, and what is said if registries do not take what is
//! in it. No login is ever seen here, only what became of one.
//!
//! The Secret that the service names is in the controller's namespace: Jobs get it as a file,
//! and the controller does not read it. One that a task names is in the task's namespace,
//! where a Job cannot have it from; the controller reads it if that namespace lets it
//! ([`access`]), and makes a copy that belongs to the Job and goes with it.

use crate::job;
use crate::plan::{failed, why};
use crate::report::{Output, Problem, Refused};
use crate::resource::{AcceleratedImage, ImageAccelerationSpec};
use crate::yaml;
use anyhow::Result;
use k8s_openapi::api::core::v1::{self, ContainerStateTerminated, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::ResourceExt as _;
use serde_json::json;

/// The condition that registries let us do what is meant.
pub const ACCESS: &str = "RegistryAccess";
/// The type of Secrets that have logins.
pub const SECRET_TYPE: &str = "kubernetes.io/dockerconfigjson";
/// What of such a Secret has them.
pub const SECRET_KEY: &str = ".dockerconfigjson";

/// The Secret that a task names, as far as the controller can see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Secret {
    /// It names none.
    #[default]
    Unnamed,
    /// It can be had.
    There,
    /// There is none.
    Missing,
    /// There is one, of another type.
    OtherType,
    /// The controller may not read it.
    Forbidden,
}

impl Secret {
    /// Why the task's Secret cannot be had, if so, and what to do: a condition's reason and
    /// message.
    pub fn problem(self, task: &AcceleratedImage) -> Option<(&'static str, String)> {
        let namespace = task.namespace().unwrap_or_default();
        let name = task.spec.secret_name.as_deref().unwrap_or_default();
        match self {
            Self::Unnamed | Self::There => None,
            Self::Missing => Some((
                "NoSecret",
                format!(
                    "spec.secretName: there is no Secret {name} in the namespace {namespace}: make it (kubectl create secret docker-registry), or name another"
                ),
            )),
            Self::OtherType => Some((
                "NoSecret",
                format!(
                    "spec.secretName: the Secret {name} in the namespace {namespace} has no {SECRET_KEY}: it has to be of the type {SECRET_TYPE}"
                ),
            )),
            Self::Forbidden => Some((
                "SecretNotReadable",
                format!(
                    "spec.secretName: the controller may not read the Secret {name} in the namespace {namespace}: let it with `accel-controller secret-access {namespace} {name} | kubectl apply -f -`"
                ),
            )),
        }
    }
}

/// A copy of a task's Secret, with the logins and nothing else, which goes with `owner` and is
/// called like it. It is of no type that the API server would look into: one that is no file of
/// logins is refused by the Job, in words.
pub fn copy(secret: v1::Secret, owner: OwnerReference) -> v1::Secret {
    let mut data = secret.data.unwrap_or_default();
    data.retain(|key, _| key == SECRET_KEY);
    let (key, value) = job::MANAGED;
    v1::Secret {
        metadata: ObjectMeta {
            name: Some(owner.name.clone()),
            labels: Some([(key.to_owned(), value.to_owned())].into()),
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        type_: Some("Opaque".to_owned()),
        data: Some(data),
        ..v1::Secret::default()
    }
}

/// Which Secret a Job has its login from, for people.
#[derive(Debug, Clone, Copy)]
pub enum Whose<'a> {
    /// The task's.
    Task(&'a AcceleratedImage),
    /// The service's.
    Service(&'a ImageAccelerationSpec),
}

impl<'a> Whose<'a> {
    /// That of a task.
    pub fn of(task: &'a AcceleratedImage, service: &'a ImageAccelerationSpec) -> Self {
        match task.spec.secret_name {
            Some(_) => Self::Task(task),
            None => Self::Service(service),
        }
    }

    fn name(self) -> Option<String> {
        match self {
            Self::Task(task) => {
                let name = task.spec.secret_name.as_ref()?;
                Some(format!("the Secret {name} (spec.secretName)"))
            }
            Self::Service(service) => {
                let name = service.registry.secret_name.as_ref()?;
                Some(format!(
                    "the Secret {name} in the controller's namespace (spec.registry.secretName of the ImageAcceleration)"
                ))
            }
        }
    }
}

/// Why a registry did not do what it was asked for, and what to do: a condition's reason, and
/// the advice for its message.
pub fn advice(refused: &Refused, whose: Whose<'_>) -> (&'static str, String) {
    let registry = match refused.registry.as_str() {
        "" => "the registry",
        registry => registry,
    };
    let secret = whose.name();
    let secret = secret.as_deref();
    match (refused.problem, secret) {
        (Problem::NoLoginFile, Some(secret)) => (
            "NoSecret",
            format!(
                "{secret} is not there, or has no file of logins as those of the type {SECRET_TYPE} have: make it (kubectl create secret docker-registry)"
            ),
        ),
        (Problem::NoLogin, Some(secret)) => (
            "NoLogin",
            format!("{secret} has no login for {registry}: add one"),
        ),
        (Problem::NoLogin | Problem::NoLoginFile, None) => (
            "NoLogin",
            format!(
                "no Secret is named that could have a login for {registry}: spec.secretName of the task, or spec.registry.secretName of the ImageAcceleration"
            ),
        ),
        (Problem::Unauthorized, secret) => (
            "Unauthorized",
            format!(
                "correct user and password for {registry} in {}",
                secret.unwrap_or("the Secret")
            ),
        ),
        (Problem::Forbidden, secret) => (
            "Forbidden",
            format!(
                "give the user of {} the right at {registry}, or name one who has it",
                secret.unwrap_or("the Secret")
            ),
        ),
        (Problem::NotFound, _) => (
            "NotFound",
            "the image cannot be had: look at its name, and whether the user may see it".to_owned(),
        ),
        (Problem::NoTarget, _) => (
            "NotFound",
            format!(
                "make the repository at {registry}, or name another target: spec.target of the task, or spec.registry.pushTo of the ImageAcceleration"
            ),
        ),
        (Problem::Unreachable, _) => (
            "Unreachable",
            format!(
                "is {registry} its name, does the network of the Jobs lead there, and does it speak TLS, or spec.registry.plainHttp of the ImageAcceleration say that it does not?"
            ),
        ),
        (Problem::Other, _) => (
            "Failed",
            "the registry's answer says what is wrong".to_owned(),
        ),
    }
}

/// A pod's log, or why it cannot be read.
pub type Log = Result<Output, String>;

/// A registry that did not let a Job do its work, and how the Job's pod ended then.
pub(crate) type Refusal<'a> = (&'a Refused, &'a ContainerStateTerminated);

/// Which registry did not let a pod do its work, if it has failed for that.
pub(crate) fn refusal<'a>(pod: Option<&'a Pod>, log: Option<&'a Log>) -> Option<Refusal<'a>> {
    let refused = log?.as_ref().ok()?.refused.as_ref()?;
    Some((refused, failed(pod)?))
}

/// A condition's reason and message for it: what it says, and what to do.
pub(crate) fn refused(refusal: Refusal<'_>, whose: Whose<'_>) -> (&'static str, String) {
    let (refused, ended) = refusal;
    let (reason, advice) = advice(refused, whose);
    let said = crate::report::words(ended.message.as_deref().unwrap_or_default());
    (reason, format!("{said} ({advice})"))
}

/// Why a Job has failed, of which the cluster says `end` (reason and message), and what to do;
/// with a condition's reason if a registry did not let it do its work.
pub(crate) fn failure(
    pod: Option<&Pod>,
    log: Option<&Log>,
    whose: Whose<'_>,
    end: (&str, &str),
) -> (Option<&'static str>, String) {
    match refusal(pod, log) {
        Some(refusal) => {
            let (access, what) = refused(refusal, whose);
            (Some(access), what)
        }
        None => (None, why(pod, end)),
    }
}

/// What a namespace gives the controller, which is in `controller`, so that it can read one of
/// its Secrets: that one, and nothing else. As YAML documents.
///
/// # Errors
/// None is known: all that they consist of can be written.
pub fn access(controller: &str, namespace: &str, secret: &str) -> Result<String> {
    let name = format!("accel-controller-{secret}");
    let meta = json!({"name": name, "namespace": namespace});
    let group = "rbac.authorization.k8s.io";
    let version = format!("{group}/v1");
    let documents = [
        json!({"apiVersion": version, "kind": "Role", "metadata": meta,
            "rules": [{"apiGroups": [""], "resources": ["secrets"],
                "resourceNames": [secret], "verbs": ["get"]}]}),
        json!({"apiVersion": version, "kind": "RoleBinding", "metadata": meta,
            "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": "accel-controller",
                "namespace": controller}]}),
    ];
    yaml::documents(documents)
}

#[cfg(test)]
mod tests;
