//! The Jobs of a task: the one that converts its image, and the one that removes what came of
//! it.

use crate::reference::Names;
use crate::resource::{AcceleratedImage, ImageAccelerationSpec, UfsVolume};
use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, HostPathVolumeSource, KeyToPath, NFSVolumeSource,
    PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec, PodTemplateSpec,
    ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt as _;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// On Jobs and pods: the task's UID.
pub const TASK_UID: &str = "image-accel.io/task-uid";
/// On Jobs: where the task is. Annotations, because names may be longer than labels.
const TASK_NAMESPACE: &str = "image-accel.io/task-namespace";
const TASK_NAME: &str = "image-accel.io/task-name";
/// On all that the controller makes.
pub const MANAGED: (&str, &str) = ("app.kubernetes.io/managed-by", "accel-controller");
/// On Jobs that try UFS, and ask registries whether they take logins.
pub const CHECK: (&str, &str) = ("app.kubernetes.io/component", "check");

const UFS: &str = "/ufs";
const LOGIN: &str = "/login";

/// What the controller is told when it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Where Jobs run, and what they need is.
    pub namespace: String,
    /// An image with `mkfs-accel`.
    pub image: String,
    /// What the cluster is called on UFS.
    pub cluster: String,
}

/// The longest that a Job may take that converts nothing, in seconds.
const SHORT_DEADLINE: u32 = 600;

/// What selects all that has this label.
pub fn selector((key, value): (&str, &str)) -> String {
    format!("{key}={value}")
}

/// The name of the Job for a version of a task, when `failures` of them have failed.
pub fn name(uid: &str, generation: i64, failures: u32) -> String {
    format!("accel-{uid}-{generation}-{failures}")
}

/// The name of the Job that removes what a task made, when `failures` of them have failed.
pub fn removal_name(uid: &str, failures: u32) -> String {
    format!("accel-{uid}-delete-{failures}")
}

/// Under which name a task's layers are claimed on UFS.
fn claim(task: &AcceleratedImage, settings: &Settings) -> String {
    format!("{}/{}", settings.cluster, task.uid().unwrap_or_default())
}

/// Of which task a Job is: namespace and name.
pub fn task_of(job: &Job) -> Option<(&str, &str)> {
    let annotations = job.annotations();
    let namespace = annotations.get(TASK_NAMESPACE)?;
    Some((namespace, annotations.get(TASK_NAME)?))
}

/// Where a Job has its login from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Login<'a> {
    /// It has none.
    None,
    /// This Secret, whether there is one or not: the Job tells.
    Secret(&'a str),
    /// A Secret that is called like the Job, and is made for it: a copy of one that is in
    /// another namespace.
    Lent,
}

impl<'a> Login<'a> {
    /// That of all tasks that name none.
    pub fn of_service(service: &'a ImageAccelerationSpec) -> Self {
        match &service.registry.secret_name {
            Some(name) => Self::Secret(name),
            None => Self::None,
        }
    }
}

/// Whether a Job waits for a Secret that is made for it.
pub fn is_lent(job: &Job) -> bool {
    let pod = job
        .spec
        .as_ref()
        .and_then(|spec| spec.template.spec.as_ref());
    let volumes = pod.and_then(|pod| pod.volumes.as_ref());
    volumes.into_iter().flatten().any(|volume| {
        let secret = volume.secret.as_ref();
        secret.is_some_and(|secret| secret.secret_name == job.metadata.name)
    })
}

/// The Job of that name, which converts.
pub fn build(
    name: String,
    task: &AcceleratedImage,
    service: &ImageAccelerationSpec,
    names: &Names,
    settings: &Settings,
) -> Job {
    let login = match task.spec.secret_name {
        Some(_) => Login::Lent,
        None => Login::of_service(service),
    };
    let work = Work {
        arguments: arguments(task, service, names, login, settings),
        retries: service.jobs.retries.into(),
        deadline: service.jobs.deadline_seconds,
        login,
    };
    of_task(with(name, service, work, settings), task)
}

/// The Job of that name, which tries UFS as the others get it, and asks registries whether they
/// take the logins of the service; `registry` besides those that there are logins for.
pub fn build_check(
    name: String,
    service: &ImageAccelerationSpec,
    registry: Option<&str>,
    settings: &Settings,
) -> Job {
    let login = Login::of_service(service);
    let mut arguments: Vec<_> = ["check", "--json", "--ufs", UFS].map(str::to_owned).into();
    arguments.extend(registry.map(str::to_owned));
    arguments.extend(registry_options(service, login));
    let work = Work {
        arguments,
        retries: 0,
        deadline: service.jobs.deadline_seconds.min(SHORT_DEADLINE),
        login,
    };
    let mut job = with(name, service, work, settings);
    let check = BTreeMap::from([(CHECK.0.to_owned(), CHECK.1.to_owned())]);
    label(&mut job, &check);
    job
}

/// The Job of that name, which removes what the task made. `gone` are nodes that are no more;
/// `has_login` says whether the Secret that the task names, if it names one, can be had.
pub fn build_removal(
    name: String,
    task: &AcceleratedImage,
    service: &ImageAccelerationSpec,
    gone: &[String],
    has_login: bool,
    settings: &Settings,
) -> Job {
    let login = match task.spec.secret_name {
        Some(_) if has_login => Login::Lent,
        // Its namespace may be going, and all that is in it.
        _ => Login::of_service(service),
    };
    let mut arguments = vec!["delete".to_owned()];
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    add("--claim", claim(task, settings));
    add("--ufs", UFS.to_owned());
    for node in gone {
        add("--gone", format!("{}/{node}", settings.cluster));
    }
    arguments.extend(registry_options(service, login));
    arguments.push("--json".to_owned());
    let work = Work {
        arguments,
        // What it says when it fails counts: that nodes use it.
        retries: 0,
        deadline: service.jobs.deadline_seconds.min(SHORT_DEADLINE),
        login,
    };
    of_task(with(name, service, work, settings), task)
}

/// What a Job does.
struct Work<'a> {
    arguments: Vec<String>,
    retries: i32,
    /// In seconds.
    deadline: u32,
    login: Login<'a>,
}

/// A Job. It may do nothing but read its login and write to UFS.
fn with(name: String, service: &ImageAccelerationSpec, work: Work<'_>, settings: &Settings) -> Job {
    let jobs = &service.jobs;
    let labels: BTreeMap<_, _> = [("app.kubernetes.io/name", "mkfs-accel"), MANAGED]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
    let mut volumes = vec![ufs_volume(service)];
    let mut mounts = vec![mount("ufs", UFS, false)];
    let secret = match work.login {
        Login::None => None,
        // The Job says that it is not there, in words; otherwise its pod would wait for it.
        Login::Secret(secret) => Some(login_volume(secret, true)),
        Login::Lent => Some(login_volume(&name, false)),
    };
    if let Some(secret) = secret {
        volumes.push(secret);
        mounts.push(mount("login", LOGIN, true));
    }
    let quantity = |name: &str, value: String| (name.to_owned(), Quantity(value));
    let memory = format!("{}Mi", jobs.memory_mib);
    let container = Container {
        name: "convert".to_owned(),
        image: Some(settings.image.clone()),
        command: Some(vec!["mkfs-accel".to_owned()]),
        args: Some(work.arguments),
        // Errors are the end of the log, which is part of the pod's status then.
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        resources: Some(ResourceRequirements {
            requests: Some(
                [
                    quantity("cpu", format!("{}m", jobs.cpu_millis)),
                    quantity("memory", memory.clone()),
                ]
                .into(),
            ),
            limits: Some([quantity("memory", memory)].into()),
            ..ResourceRequirements::default()
        }),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities {
                drop: Some(vec!["ALL".to_owned()]),
                add: None,
            }),
            ..SecurityContext::default()
        }),
        volume_mounts: Some(mounts),
        ..Container::default()
    };
    let pod = PodSpec {
        containers: vec![container],
        volumes: Some(volumes),
        restart_policy: Some("Never".to_owned()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        node_selector: (!jobs.node_selector.is_empty()).then(|| jobs.node_selector.clone()),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(jobs.user),
            run_as_group: Some(jobs.user),
            fs_group: Some(jobs.user),
            // UFS is large, and was not made for this pod.
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                ..SeccompProfile::default()
            }),
            ..PodSecurityContext::default()
        }),
        ..PodSpec::default()
    };
    Job {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(settings.namespace.clone()),
            labels: Some(labels.clone()),
            ..ObjectMeta::default()
        },
        spec: Some(JobSpec {
            backoff_limit: Some(work.retries),
            active_deadline_seconds: Some(work.deadline.into()),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(labels),
                    ..ObjectMeta::default()
                }),
                spec: Some(pod),
            },
            ..JobSpec::default()
        }),
        status: None,
    }
}

/// Says on a Job and its pods of which task they are.
fn of_task(mut job: Job, task: &AcceleratedImage) -> Job {
    let uid = BTreeMap::from([(TASK_UID.to_owned(), task.uid().unwrap_or_default())]);
    label(&mut job, &uid);
    let annotations = job.metadata.annotations.get_or_insert_default();
    let namespace = task.namespace().unwrap_or_default();
    annotations.insert(TASK_NAMESPACE.to_owned(), namespace);
    annotations.insert(TASK_NAME.to_owned(), task.name_any());
    job
}

fn label(job: &mut Job, more: &BTreeMap<String, String>) {
    let pod = job
        .spec
        .as_mut()
        .and_then(|spec| spec.template.metadata.as_mut());
    for metadata in [Some(&mut job.metadata), pod].into_iter().flatten() {
        let labels = metadata.labels.get_or_insert_default();
        labels.extend(more.clone());
    }
}

fn arguments(
    task: &AcceleratedImage,
    service: &ImageAccelerationSpec,
    names: &Names,
    login: Login<'_>,
    settings: &Settings,
) -> Vec<String> {
    let mut arguments = vec!["convert", &names.source, "--ufs", UFS];
    let claim = claim(task, settings);
    arguments.extend(["--claim", &claim, "--push", &names.target]);
    for platform in &task.spec.platforms {
        arguments.extend(["--platform", platform]);
    }
    arguments.push("--json-lines");
    let mut arguments: Vec<_> = arguments.into_iter().map(str::to_owned).collect();
    arguments.extend(registry_options(service, login));
    arguments
}

/// How registries are reached.
fn registry_options(service: &ImageAccelerationSpec, login: Login<'_>) -> Vec<String> {
    let mut options = Vec::new();
    if login != Login::None {
        options.extend([
            "--registry-config".to_owned(),
            format!("{LOGIN}/config.json"),
        ]);
    }
    if service.registry.plain_http {
        options.push("--plain-http".to_owned());
    }
    options
}

fn mount(name: &str, at: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: at.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    }
}

fn ufs_volume(service: &ImageAccelerationSpec) -> Volume {
    let mut volume = Volume {
        name: "ufs".to_owned(),
        ..Volume::default()
    };
    match service.ufs.place() {
        Some(UfsVolume::Claim(name)) => {
            volume.persistent_volume_claim = Some(PersistentVolumeClaimVolumeSource {
                claim_name: name.to_owned(),
                read_only: None,
            });
        }
        Some(UfsVolume::Nfs(server, path)) => {
            volume.nfs = Some(NFSVolumeSource {
                server: server.to_owned(),
                path: path.to_owned(),
                read_only: None,
            });
        }
        Some(UfsVolume::HostPath(path)) => {
            volume.host_path = Some(HostPathVolumeSource {
                path: path.to_owned(),
                // It is not made where it is missing.
                type_: Some("Directory".to_owned()),
            });
        }
        // No schema lets it through; the pod is refused with the volume's name.
        None => {}
    }
    volume
}

fn login_volume(secret: &str, optional: bool) -> Volume {
    Volume {
        name: "login".to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret.to_owned()),
            optional: optional.then_some(true),
            items: Some(vec![KeyToPath {
                key: ".dockerconfigjson".to_owned(),
                path: "config.json".to_owned(),
                mode: None,
            }]),
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    }
}

/// Whether a Job has come to an end, and how: `Ok`, or the condition's reason and message.
pub fn end(job: &Job) -> Option<Result<(), (String, String)>> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    conditions
        .iter()
        .filter(|condition| condition.status == "True")
        .find_map(|condition| match condition.type_.as_str() {
            "Complete" => Some(Ok(())),
            "Failed" => Some(Err((
                condition.reason.clone().unwrap_or_default(),
                condition.message.clone().unwrap_or_default(),
            ))),
            _ => None,
        })
}

/// Whether a Job takes part in the limit.
pub fn is_at_work(job: &Job) -> bool {
    end(job).is_none() && !is_held(job)
}

/// Keeps a Job from making any more pods. Those that have ended stay with it, and their logs.
pub fn hold() -> Value {
    json!({"spec": {"parallelism": 0}})
}

fn is_held(job: &Job) -> bool {
    let spec = job.spec.as_ref();
    spec.is_some_and(|spec| spec.parallelism == Some(0))
}
