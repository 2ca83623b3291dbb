//! The resources, as the cluster stores them. `accel-controller crds` prints the
//! definitions that follow from these types; `deploy/kubernetes/crds` has them.
//!
//! What a schema can tell is refused by the API server: no rules in CEL, which servers
//! before 1.25 do not know. The rest is for [`crate::plan`].

#![allow(clippy::duplicated_attributes)] // columns have types in common

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, CustomResourceExt as _};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The API group.
pub const GROUP: &str = "image-accel.io";

/// The one [`ImageAcceleration`] that a cluster can have.
pub const SERVICE_NAME: &str = "cluster";

/// An image's name with the registry, and a tag or digest.
const REFERENCE: &str = r"^(\[[0-9a-fA-F:]+\]|[a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?)(:[0-9]{1,5})?(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)+(:[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127})?(@sha256:[0-9a-f]{64})?$";
/// The same without digest.
const TAGGED: &str = r"^(\[[0-9a-fA-F:]+\]|[a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?)(:[0-9]{1,5})?(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)+:[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$";
/// A registry, and what repositories in it begin with.
const PREFIX: &str = r"^(\[[0-9a-fA-F:]+\]|[a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?)(:[0-9]{1,5})?(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$";
/// The name of an object in a namespace.
const NAME: &str = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$";

/// The key of a label: a name, before which there may be a domain's and a slash.
const KEY: &str = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$";

/// Turns acceleration on for the cluster. There is one, called `cluster`; without it tasks
/// wait.
#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "image-accel.io",
    version = "v1alpha1",
    kind = "ImageAcceleration",
    plural = "imageaccelerations",
    doc = "Turns acceleration on for the cluster. There is one, called cluster; without it tasks wait.",
    status = "ImageAccelerationStatus",
    derive = "PartialEq",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(
        name = "UFS",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"UfsReady\")].status"
    ),
    printcolumn(
        name = "Controller",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"ControllerReady\")].status"
    ),
    printcolumn(
        name = "Images",
        type_ = "integer",
        json_path = ".status.images",
        description = "Tasks that are Ready"
    ),
    printcolumn(
        name = "Stored",
        type_ = "string",
        json_path = ".status.stored",
        description = "What their layers take on UFS"
    ),
    printcolumn(
        name = "Nodes",
        type_ = "string",
        json_path = ".status.nodesText",
        description = "Nodes that can start accelerated images, of those that are meant"
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message"
    )
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ImageAccelerationSpec {
    /// Where converted layers are kept. Exactly one of these is given.
    pub ufs: UfsSpec,
    /// How registries are reached.
    #[serde(default)]
    pub registry: RegistrySpec,
    /// How images are converted.
    #[serde(default)]
    pub jobs: JobsSpec,
    /// Which nodes get a label while they can start accelerated images.
    #[serde(default)]
    pub nodes: NodesSpec,
    /// When this is deleted: delete all tasks as well, and with them what they have made on
    /// UFS and in registries. It is gone when they are, which wait until no node uses their
    /// images. Otherwise all of that stays.
    #[serde(default)]
    pub purge: bool,
}

/// Which nodes get a label while they can start accelerated images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NodesSpec {
    /// Labels that a node has to have; unless there are any, all nodes are meant.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub selector: BTreeMap<String, String>,
    /// The label's key; its value is `true`.
    #[schemars(regex(pattern = KEY), length(max = 317))]
    pub label: String,
}

impl Default for NodesSpec {
    fn default() -> Self {
        Self {
            selector: BTreeMap::new(),
            label: "node.uk8s.ucloud.cn/uimgacc".to_owned(),
        }
    }
}

/// Where converted layers are kept: what nodes read, and the Jobs write. Exactly one of these.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UfsSpec {
    /// A PersistentVolumeClaim in the controller's namespace: ReadWriteMany, unless all Jobs
    /// run on one node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = NAME))]
    pub claim_name: Option<String>,
    /// A directory of an NFS server, which the Jobs' nodes mount for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nfs: Option<NfsSpec>,
    /// Where the nodes on which Jobs run have it mounted: an absolute path. A node on which it
    /// is not mounted would keep what is converted for itself: see `jobs.nodeSelector`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^/.*$"), length(max = 1024))]
    pub host_path: Option<String>,
}

/// A directory of an NFS server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NfsSpec {
    /// Its name or address.
    #[schemars(regex(pattern = r"^[a-zA-Z0-9:.\[\]_-]+$"), length(max = 253))]
    pub server: String,
    /// What it exports: an absolute path.
    #[schemars(regex(pattern = r"^/.*$"), length(max = 1024))]
    pub path: String,
}

/// What of [`UfsSpec`] is given; the schema lets nothing else through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UfsVolume<'a> {
    /// The claim of this name.
    Claim(&'a str),
    /// A server, and a path on it.
    Nfs(&'a str, &'a str),
    /// A path on nodes.
    HostPath(&'a str),
}

/// The fields of [`UfsSpec`].
const UFS_PLACES: [&str; 3] = ["claimName", "nfs", "hostPath"];

impl UfsSpec {
    /// Where it is, if exactly that is said.
    pub fn place(&self) -> Option<UfsVolume<'_>> {
        match (&self.claim_name, &self.nfs, &self.host_path) {
            (Some(name), None, None) => Some(UfsVolume::Claim(name)),
            (None, Some(nfs), None) => Some(UfsVolume::Nfs(&nfs.server, &nfs.path)),
            (None, None, Some(path)) => Some(UfsVolume::HostPath(path)),
            _ => None,
        }
    }
}

/// How registries are reached.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RegistrySpec {
    /// A Secret of the type kubernetes.io/dockerconfigjson in the controller's namespace,
    /// with the logins for pulling and pushing. The Jobs get it; the controller itself
    /// never reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = NAME))]
    pub secret_name: Option<String>,
    /// Where accelerated images go whose task names no target: `HOST[:PORT][/PREFIX]`. Unless
    /// it is set they go beside the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = PREFIX), length(max = 255))]
    pub push_to: Option<String>,
    /// Talk HTTP instead of HTTPS to registries.
    #[serde(default)]
    pub plain_http: bool,
}

/// How images are converted: one Job for each task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct JobsSpec {
    /// How many may run at a time.
    #[schemars(range(min = 1, max = 1000))]
    pub limit: u16,
    /// How long one may take, in seconds.
    #[schemars(range(min = 60, max = 604_800))]
    pub deadline_seconds: u32,
    /// How often a Job starts again within this time before its task fails. What was
    /// converted until then is not converted again.
    #[schemars(range(min = 0, max = 100))]
    pub retries: u16,
    /// The user and group, as a number, that they run as: UFS must be writable to it.
    #[schemars(range(min = 1, max = 2_147_483_647))]
    pub user: i64,
    /// What each may use of memory, in MiB.
    #[schemars(range(min = 128, max = 1_048_576))]
    pub memory_mib: u32,
    /// What each is promised of processors, in thousandths.
    #[schemars(range(min = 10, max = 1_000_000))]
    pub cpu_millis: u32,
    /// On which nodes: those that reach UFS and the registries.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
}

impl Default for JobsSpec {
    fn default() -> Self {
        Self {
            limit: 4,
            deadline_seconds: 6 * 3600,
            retries: 3,
            user: 65532,
            memory_mib: 2048,
            cpu_millis: 500,
            node_selector: BTreeMap::new(),
        }
    }
}

/// What the controller says of the service.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ImageAccelerationStatus {
    /// `UfsReady`: a Job has mounted UFS, written to it and read it back, and nobody who needs it
    /// has said since then that it is away; `RegistryAccess`: registries take the logins; `Ready`:
    /// nothing is known that keeps tasks from being converted. They are tried in any case.
    /// `NodesLabelled`: the cluster takes the label; `ControllerReady`: a controller leads, and
    /// nothing keeps it from looking (one that is dead cannot say so: its Lease is not renewed,
    /// and `kubectl accel get --service` heeds that). While it is deleted with `purge`, `Purged`:
    /// what is left.
    pub conditions: Vec<Condition>,
    /// How far it is with trying UFS, and asking registries whether they take the logins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check: Option<CheckStatus>,
    /// Tasks that are Ready.
    pub images: u32,
    /// What their layers take on UFS, those that several of them have counted once for each.
    pub stored_bytes: u64,
    /// The same for people.
    pub stored: String,
    /// Nodes that are meant.
    pub nodes: u32,
    /// Those of them that can start accelerated images, and have the label.
    pub nodes_ready: u32,
    /// Both for people: `READY/ALL`.
    pub nodes_text: String,
}

/// How far it is with trying UFS, and asking registries whether they take the logins.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CheckStatus {
    /// Of what: of these settings.
    pub of: String,
    /// How often it came to nothing.
    pub failures: u32,
    /// How often it was begun anew although it had gone well, because UFS seemed to be away.
    #[serde(skip_serializing_if = "is_none")]
    pub rounds: u32,
    /// How many of these rounds came soon one after the other: the more, the later the next one.
    #[serde(skip_serializing_if = "is_none")]
    pub doubts: u32,
    /// Whether the nodes said that they cannot read from UFS when it was tried last.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub doubted: bool,
    /// When it was tried last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// UFS can be used, and all registries take theirs.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub passed: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
const fn is_none(number: &u32) -> bool {
    *number == 0
}

/// A task: an image that nodes are to start without downloading it.
#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "image-accel.io",
    version = "v1alpha1",
    kind = "AcceleratedImage",
    plural = "acceleratedimages",
    namespaced,
    doc = "A task: an image that nodes are to start without downloading it.",
    status = "AcceleratedImageStatus",
    derive = "PartialEq",
    shortname = "accimg",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Source", type_ = "string", json_path = ".spec.source"),
    printcolumn(name = "Target", type_ = "string", json_path = ".status.target"),
    printcolumn(
        name = "Layers",
        type_ = "integer",
        json_path = ".status.layers",
        priority = 1
    ),
    printcolumn(
        name = "Progress",
        type_ = "string",
        json_path = ".status.progress.text"
    ),
    printcolumn(
        name = "Stored",
        type_ = "string",
        json_path = ".status.stored",
        description = "What the layers take on UFS"
    ),
    printcolumn(
        name = "UsedBy",
        type_ = "integer",
        json_path = ".status.usedByCount",
        description = "Nodes with containers on it"
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.message",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AcceleratedImageSpec {
    /// The image: `HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]`.
    #[schemars(regex(pattern = REFERENCE), length(max = 512))]
    pub source: String,
    /// What the accelerated image is called: `HOST[:PORT]/REPOSITORY:TAG`. Otherwise as the
    /// source, with `-acc` behind the tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = TAGGED), length(max = 512))]
    pub target: Option<String>,
    /// Which platforms of the image, as `OS/ARCHITECTURE[/VARIANT]`; `all` for all it has.
    /// Otherwise that of the node on which the Job runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(regex(pattern = r"^(all|[a-z0-9]+/[a-z0-9]+(/[a-z0-9.]+)?)$"))
    )]
    pub platforms: Vec<String>,
    /// A Secret of the type kubernetes.io/dockerconfigjson in the task's own namespace, with
    /// the logins for pulling and pushing, instead of the one that the ImageAcceleration
    /// names. `accel-controller secret-access` lets the controller read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = NAME))]
    pub secret_name: Option<String>,
}

/// How far a task is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Waited for, or being converted.
    Creating,
    /// All layers are on UFS, and the accelerated image is in the registry.
    Ready,
    /// It could not be converted; it is tried again.
    CreateError,
    /// Is being removed, or waits until no node uses it.
    Deleting,
    /// It could not be removed, for example because UFS does not answer; it is tried again.
    DeleteError,
    /// The controller cannot tell: it has not looked yet, or what knows does not answer.
    #[default]
    Unknown,
}

/// What the controller says of a task.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AcceleratedImageStatus {
    /// How far it is.
    pub phase: Phase,
    /// Of which version of the task all this speaks.
    pub observed_generation: i64,
    /// `Accepted`: the task can be worked on; `RegistryAccess`: the source can be pulled, and
    /// the target pushed to; `Ready`: as the phase of that name. While it is being deleted,
    /// `InUse`: nodes use its layers; `Removed`: they are gone.
    pub conditions: Vec<Condition>,
    /// What it waits for, or what went wrong and what to do.
    pub message: String,
    /// What the accelerated image is called.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub target: String,
    /// How far the conversion is, while there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressStatus>,
    /// The source's manifest, of the first platform.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_digest: Option<String>,
    /// The accelerated image's manifest or index.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_digest: Option<String>,
    /// How many layers it has; those that several platforms have count once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<u32>,
    /// Their size in the registry, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub original_bytes: Option<u64>,
    /// What they take on UFS, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stored_bytes: Option<u64>,
    /// What of that other images had as well when this one became Ready, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared_bytes: Option<u64>,
    /// `storedBytes` for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stored: String,
    /// When the first Job was made for this version of the task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When it became Ready or failed, unless it is being tried again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// How many Jobs have failed for this version of the task.
    pub failures: u32,
    /// Whether a Job was ever made for it: then there may be something on UFS that goes with
    /// the task.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub claimed: bool,
    /// Nodes that it waits for while it is being deleted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub waits_for_nodes: Vec<UserStatus>,
    /// The chain IDs of its images, one for each platform: of the uppermost layer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub chain_ids: Vec<String>,
    /// Nodes of this cluster with containers on its image, by name: the first hundred. Those that
    /// are silent count with what they have said last, until the cluster has them no more. Tasks
    /// with the same image have the same nodes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub used_by: Vec<String>,
    /// How many nodes these are, all of them; missing as long as it has no image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub used_by_count: Option<u32>,
}

impl AcceleratedImageStatus {
    /// Without what [`crate::users`] says, which is written apart.
    #[must_use]
    pub fn planned(&self) -> Self {
        Self {
            used_by: Vec::new(),
            used_by_count: None,
            ..self.clone()
        }
    }
}

impl AcceleratedImage {
    /// What is said of the task, if it is said of the task as it is now.
    pub fn current(&self) -> Option<&AcceleratedImageStatus> {
        let generation = self.metadata.generation.unwrap_or_default();
        let status = self.status.as_ref();
        status.filter(|status| status.observed_generation == generation)
    }
}

/// A node that uses layers of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UserStatus {
    /// The UID of its cluster's namespace kube-system.
    pub cluster: String,
    /// Its name.
    pub node: String,
    /// It has said nothing for long: everything counts that it had mounted.
    pub expired: bool,
}

/// How far a conversion is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ProgressStatus {
    /// Layers of the image, or of the platform that is being worked on.
    pub layers: u32,
    /// Those of them that are on UFS.
    pub layers_done: u32,
    /// What has to be read of the registry for the others, in bytes.
    pub bytes: u64,
    /// What has been read of that.
    pub bytes_done: u64,
    /// Bytes read per second, since the Job's program began.
    pub bytes_per_second: u64,
    /// All that for people.
    pub text: String,
}

/// The definitions of both resources, as a cluster wants them.
pub fn definitions() -> Vec<CustomResourceDefinition> {
    let mut definitions = vec![ImageAcceleration::crd(), AcceleratedImage::crd()];
    for schema in definitions.iter_mut().flat_map(schemas) {
        let properties = schema.properties.get_or_insert_default();
        if let Some(status) = properties.get_mut("status") {
            without_defaults(status);
        }
    }
    for schema in schemas(&mut definitions[0]) {
        name_is(schema, SERVICE_NAME);
        let spec = schema
            .properties
            .as_mut()
            .and_then(|all| all.get_mut("spec"));
        let properties = spec.and_then(|spec| spec.properties.as_mut());
        if let Some(ufs) = properties.and_then(|all| all.get_mut("ufs")) {
            exactly_one_of(ufs, &UFS_PLACES);
        }
    }
    definitions
}

fn schemas(
    definition: &mut CustomResourceDefinition,
) -> impl Iterator<Item = &mut JSONSchemaProps> {
    let versions = definition.spec.versions.iter_mut();
    versions.filter_map(|version| version.schema.as_mut()?.open_api_v3_schema.as_mut())
}

/// A status says what the controller says, and nothing by itself.
fn without_defaults(schema: &mut JSONSchemaProps) {
    schema.default = None;
    for property in schema
        .properties
        .iter_mut()
        .flat_map(|all| all.values_mut())
    {
        without_defaults(property);
    }
}

/// Has the API server refuse what has none of these fields, or several.
fn exactly_one_of(schema: &mut JSONSchemaProps, names: &[&str]) {
    let needs = |name: &&str| JSONSchemaProps {
        required: Some(vec![(*name).to_owned()]),
        ..JSONSchemaProps::default()
    };
    schema.one_of = Some(names.iter().map(needs).collect());
    let properties = schema.properties.iter_mut().flatten();
    for (_, property) in properties.filter(|(name, _)| names.contains(&name.as_str())) {
        // One that is null would be there.
        property.nullable = None;
    }
}

/// Has the API server refuse objects with another name.
fn name_is(schema: &mut JSONSchemaProps, name: &str) {
    let name = JSONSchemaProps {
        type_: Some("string".to_owned()),
        pattern: Some(format!("^{name}$")),
        ..JSONSchemaProps::default()
    };
    let metadata = JSONSchemaProps {
        type_: Some("object".to_owned()),
        properties: Some([("name".to_owned(), name)].into()),
        ..JSONSchemaProps::default()
    };
    let properties = schema.properties.get_or_insert_default();
    properties.insert("metadata".to_owned(), metadata);
}

/// The definitions as text: YAML, one document for each.
///
/// # Errors
/// None is known: all that they consist of can be written.
pub fn definitions_yaml() -> Result<Vec<(String, String)>, serde_saphyr::ser::Error> {
    let text = |definition: CustomResourceDefinition| {
        let plural = definition.spec.names.plural.clone();
        Ok((
            format!("{plural}.yaml"),
            serde_saphyr::to_string(&definition)?,
        ))
    };
    definitions().into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn labels_that_no_node_could_have_are_refused() {
        let pattern = regex::Regex::new(KEY).unwrap();
        let long = "n".repeat(63);
        for good in [
            "fast",
            "node.uk8s.ucloud.cn/uimgacc",
            "a/B.c_d-e",
            "a-b.c/x",
            &long,
        ] {
            assert!(pattern.is_match(good), "{good}");
        }
        for bad in [
            "",
            "/x",
            "a/",
            "a..b/x",
            "a.-b/x",
            "a-.b/x",
            ".a/x",
            "a./x",
            "A/x",
            "a_b/x",
            "a/b/c",
            "-x",
            "x.",
            &format!("{long}n"),
        ] {
            assert!(!pattern.is_match(bad), "{bad}");
        }
        assert!(pattern.is_match(&NodesSpec::default().label));
    }

    #[test]
    fn ufs_is_in_exactly_one_place() {
        let definition = serde_json::to_value(&definitions()[0]).unwrap();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let ufs = &schema["properties"]["spec"]["properties"]["ufs"];
        let one_of =
            json!([{"required": ["claimName"]}, {"required": ["nfs"]}, {"required": ["hostPath"]}]);
        assert_eq!(ufs["oneOf"], one_of);
        let names: Vec<_> = ufs["properties"].as_object().unwrap().iter().collect();
        assert_eq!(names.len(), UFS_PLACES.len(), "each is one of them");
        for (name, property) in names {
            assert_eq!(property.get("nullable"), None, "{name}");
        }
        let place = |ufs: Value| -> UfsSpec { serde_json::from_value(ufs).unwrap() };
        let (server, path) = ("h", "/export");
        for (ufs, expected) in [
            (json!({"claimName": "u"}), Some(UfsVolume::Claim("u"))),
            (
                json!({"nfs": {"server": server, "path": path}}),
                Some(UfsVolume::Nfs(server, path)),
            ),
            (
                json!({"hostPath": "/mnt"}),
                Some(UfsVolume::HostPath("/mnt")),
            ),
            (json!({}), None),
            (json!({"claimName": "u", "hostPath": "/mnt"}), None),
        ] {
            assert_eq!(place(ufs).place(), expected);
        }
    }
}
