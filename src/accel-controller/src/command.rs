//! What `kubectl accel` does without a cluster: names and tables.

use crate::check::{TRY_AGAIN, UFS_READY, fingerprint};
use crate::conditions;
use crate::labels::{Health, LABELLING, Word, is_kept_out, is_labelled, is_meant, lease_name};
use crate::lead::Leader;
use crate::obstacles::CONTROLLER_READY;
use crate::purge::some;
use crate::reference::Names;
use crate::resource::{AcceleratedImage, ImageAcceleration, Phase, RegistrySpec, SERVICE_NAME};
use crate::service::NOT_BOUND;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt::Display;

/// The longest name that is made up for a task: it is also part of labels.
const MAX_NAME: usize = 63;

/// What a task for this image is called unless it is given a name: the last part of the
/// repository, and the tag.
pub fn name_for(source: &str) -> String {
    let last = source.rsplit('/').next().unwrap_or_default();
    let name = last.split('@').next().unwrap_or_default();
    let plain = name.chars().map(|c| match c {
        'a'..='z' | '0'..='9' => c,
        'A'..='Z' => c.to_ascii_lowercase(),
        _ => '-',
    });
    let name: String = plain.take(MAX_NAME).collect();
    name.trim_matches('-').to_owned()
}

/// Whether two texts name the same image: `h/a` and `h/a:latest` do.
pub fn same_image(one: &str, other: &str) -> bool {
    let canonical = |text: &str| {
        let parsed = format!("docker://{text}").parse::<accel_oci::ImageSource>();
        parsed.map(|source| source.to_string())
    };
    one == other
        || matches!((canonical(one), canonical(other)), (Ok(one), Ok(other)) if one == other)
}

/// Tasks that go by this name, or convert this image, or make it.
pub fn named<'a>(tasks: &'a [AcceleratedImage], name: &str) -> Vec<&'a AcceleratedImage> {
    let by_name = tasks.iter().filter(|task| task.name_any() == name);
    let found: Vec<_> = by_name.collect();
    if !found.is_empty() {
        return found;
    }
    let target = |task: &AcceleratedImage| {
        let status = task.status.as_ref().map(|status| status.target.clone());
        status.filter(|target| !target.is_empty()).or_else(|| {
            let names = Names::of(&task.spec, &RegistrySpec::default()).ok()?;
            Some(names.image().to_owned())
        })
    };
    let is_meant = |task: &&AcceleratedImage| {
        same_image(&task.spec.source, name)
            || target(task).is_some_and(|target| same_image(&target, name))
    };
    tasks.iter().filter(is_meant).collect()
}

/// What turns acceleration on, or changes how it is done, if `there` is a service already.
/// Whatever somebody has begun to turn off for good stays then. If something was wrong it may
/// have been mended since: then it is tried again, and not only when the next try is due.
///
/// # Errors
/// It is being turned off: what is changed would go with it.
pub fn enabled(
    there: Option<&ImageAcceleration>,
    spec: &Value,
    now: Timestamp,
) -> Result<Value, String> {
    let going = there.is_some_and(|service| service.metadata.deletion_timestamp.is_some());
    if going {
        return Err(
            "acceleration is being turned off, and what was made is being removed: wait until it is off (kubectl accel disable --purge --wait), or keep what is left (kubectl accel disable)".to_owned(),
        );
    }
    let mut service = json!({
        "apiVersion": ImageAcceleration::api_version(&()),
        "kind": ImageAcceleration::kind(&()),
        "metadata": {"name": SERVICE_NAME},
        "spec": spec,
    });
    service["spec"]["purge"] = json!(false);
    let status = there.and_then(|service| service.status.as_ref());
    let check = status.and_then(|status| status.check.as_ref());
    if check.is_some_and(|check| !check.passed) {
        service["metadata"]["annotations"] = json!({TRY_AGAIN: now});
    }
    Ok(service)
}

/// What someone who waits for a task, or the service, has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Waiting {
    /// It goes on.
    GoesOn,
    /// It is Ready.
    Done,
    /// It is not, and why.
    Failed(String),
}

/// How the service stands, for someone who waits for it to be Ready; what it says then, or why it
/// is waited for.
pub fn enabling(service: &ImageAcceleration) -> (Waiting, String) {
    let status = service.status.clone().unwrap_or_default();
    let said = |type_| {
        let said = conditions::find(&status.conditions, type_);
        said.filter(|said| said.observed_generation == service.metadata.generation)
    };
    // What is said may be of a try before somebody asked for another one.
    let of = status.check.as_ref().map(|check| check.of.as_str());
    let tried = of == Some(&fingerprint(service));
    let Some(ready) = said("Ready").filter(|_| tried) else {
        let what = "the controller has not said anything";
        return (Waiting::GoesOn, what.to_owned());
    };
    // A claim that was made just now gets its volume by itself.
    let comes = said(UFS_READY).is_some_and(|ufs| ufs.reason == NOT_BOUND);
    let waiting = match ready.status.as_str() {
        "True" => Waiting::Done,
        "False" if !comes => Waiting::Failed(ready.message.clone()),
        _ => Waiting::GoesOn,
    };
    (waiting, ready.message.clone())
}

/// How a task stands, for someone who waits for it to be Ready.
pub fn waiting(task: &AcceleratedImage) -> Waiting {
    let Some(status) = task.current() else {
        return Waiting::GoesOn;
    };
    match status.phase {
        Phase::Ready => Waiting::Done,
        Phase::CreateError | Phase::DeleteError | Phase::Deleting => {
            Waiting::Failed(status.message.clone())
        }
        Phase::Creating | Phase::Unknown => Waiting::GoesOn,
    }
}

/// Tasks as lines of a table; `wide` with what else there is.
pub fn table(tasks: &[AcceleratedImage], namespaces: bool, wide: bool, now: Timestamp) -> String {
    let mut head = vec![
        "NAME", "PHASE", "SOURCE", "TARGET", "PROGRESS", "STORED", "USED BY", "AGE",
    ];
    if namespaces {
        head.insert(0, "NAMESPACE");
    }
    if wide {
        head.extend(["LAYERS", "NODES", "MESSAGE"]);
    }
    let mut lines = vec![head.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for task in tasks {
        let status = task.status.clone().unwrap_or_default();
        let progress = status.progress.map(|progress| progress.text);
        let mut line = vec![
            task.name_any(),
            format!("{:?}", status.phase),
            task.spec.source.clone(),
            status.target,
            progress.unwrap_or_default(),
            status.stored,
            status
                .used_by_count
                .map(|count| count.to_string())
                .unwrap_or_default(),
            task.creation_timestamp()
                .map(|at| age(now.duration_since(at.0).as_secs()))
                .unwrap_or_default(),
        ];
        if namespaces {
            line.insert(0, task.namespace().unwrap_or_default());
        }
        if wide {
            let layers = status.layers.map(|layers| layers.to_string());
            let count = status.used_by_count.unwrap_or_default();
            let nodes = some(
                &status.used_by,
                usize::try_from(count).unwrap_or(usize::MAX),
            );
            line.extend([layers.unwrap_or_default(), nodes, status.message]);
        }
        lines.push(line);
    }
    in_columns(&lines)
}

/// How acceleration is, and who works for it.
#[derive(Debug, Clone, Serialize)]
pub struct ServiceState {
    /// The controller.
    pub controller: ControllerState,
    /// The service as the cluster has it: what a controller has said last.
    pub service: Option<ImageAcceleration>,
}

/// Whether a controller works.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ControllerState {
    /// None if that is not known.
    pub running: Option<bool>,
    /// The one that leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
    /// Since when there is none, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// The same in words.
    pub message: String,
}

impl ControllerState {
    /// As its Lease tells, or why it does not.
    pub fn of(leader: Result<&Leader, &impl Display>) -> Self {
        let (running, name, since) = match &leader {
            Ok(Leader::One(name)) => (Some(true), Some(name.clone()), None),
            Ok(Leader::None(since)) => (Some(false), None, *since),
            Ok(Leader::Unsure) | Err(_) => (None, None, None),
        };
        Self {
            running,
            leader: name,
            since,
            message: match leader {
                Ok(leader) => leader.to_string(),
                Err(error) => format!("controller: not known: {error}"),
            },
        }
    }
}

/// How acceleration is, as lines of a table, and a line of who works for it. Without a controller
/// it is not ready, whatever one has said before.
pub fn service_table(state: &ServiceState) -> String {
    let controller = &state.controller;
    let Some(service) = &state.service else {
        let off = "acceleration is off: there is no ImageAcceleration called";
        return format!("{off} {SERVICE_NAME}\n{}", controller.message);
    };
    let status = service.status.clone().unwrap_or_default();
    let is = |type_| match conditions::find(&status.conditions, type_) {
        _ if controller.running == Some(false) && type_ != UFS_READY => "False".to_owned(),
        Some(said) => said.status.clone(),
        None => "Unknown".to_owned(),
    };
    let ready = conditions::find(&status.conditions, "Ready");
    let message = match (controller.running, ready) {
        (Some(false), _) | (_, None) => "no controller has said anything lately".to_owned(),
        (_, Some(ready)) => ready.message.clone(),
    };
    let head = [
        "READY",
        "UFS",
        "CONTROLLER",
        "NODES",
        "IMAGES",
        "STORED",
        "MESSAGE",
    ];
    let line = [
        is("Ready"),
        is(UFS_READY),
        is(CONTROLLER_READY),
        status.nodes_text,
        status.images.to_string(),
        status.stored,
        message,
    ];
    let table = in_columns(&[head.map(str::to_owned).to_vec(), line.to_vec()]);
    format!("{table}\n{}", controller.message)
}

/// Nodes as lines of a table.
pub fn nodes_table(nodes: &[NodeState]) -> String {
    let mut lines = vec![["NAME", "READY", "MESSAGE"].map(str::to_owned).to_vec()];
    for node in nodes {
        let ready = if node.ready { "yes" } else { "no" };
        lines.push(vec![
            node.name.clone(),
            ready.to_owned(),
            node.message.clone(),
        ]);
    }
    in_columns(&lines)
}

/// How a node stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodeState {
    /// What it is called.
    pub name: String,
    /// Whether it has the label.
    pub ready: bool,
    /// What came of its last check, or why there is none.
    pub message: String,
}

/// How `node` stands.
pub fn node_state(
    node: &impl Resource,
    leases: &[Lease],
    service: Option<&ImageAcceleration>,
) -> NodeState {
    let (name, labels) = (node.name_any(), node.labels());
    // For nodes one that is deleted is none, also while what was made is being removed.
    let service = service.filter(|service| service.metadata.deletion_timestamp.is_none());
    let spec = service.map(|service| &service.spec.nodes);
    let ready = spec.is_some_and(|spec| is_labelled(spec, labels));
    let status = service.and_then(|service| service.status.as_ref());
    let labelling = status.and_then(|status| conditions::find(&status.conditions, LABELLING));
    let refused = labelling.filter(|labelling| labelling.status == "False");
    let own = lease_name(&name);
    let lease = leases.iter().find(|lease| lease.name_any() == own);
    let message = match (spec, lease.map(Word::of)) {
        (None, _) => "acceleration is off".to_owned(),
        (Some(spec), _) if !is_meant(spec, labels) => {
            "is not meant: spec.nodes.selector".to_owned()
        }
        (Some(spec), _) if is_kept_out(spec, labels) => {
            format!("is kept out: {} has another value than true", spec.label)
        }
        (_, None) => "says nothing: it has no agent".to_owned(),
        (_, Some(word)) if word.message.is_empty() => "has not said anything yet".to_owned(),
        (_, Some(word)) if word.health == Health::Good && !ready && refused.is_some() => {
            let refused = refused.map(|condition| condition.message.clone());
            format!("cannot be labelled: {}", refused.unwrap_or_default())
        }
        (_, Some(word)) if word.health == Health::Good && !ready => {
            "its agent is silent, or has just begun".to_owned()
        }
        (_, Some(word)) => word.message,
    };
    NodeState {
        name,
        ready,
        message,
    }
}

fn in_columns(lines: &[Vec<String>]) -> String {
    let columns = lines[0].len();
    let width = |column: usize| {
        let cells = lines.iter().map(|line| line[column].chars().count());
        cells.max().unwrap_or_default()
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let line = |cells: &Vec<String>| {
        let padded = cells.iter().zip(&widths);
        let padded: Vec<_> = padded
            .map(|(cell, &width)| format!("{cell:<width$}"))
            .collect();
        padded.join("   ").trim_end().to_owned()
    };
    lines.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Seconds as kubectl shows them.
fn age(seconds: i64) -> String {
    match seconds.max(0) {
        s if s < 120 => format!("{s}s"),
        s if s < 2 * 3600 => format!("{}m", s / 60),
        s if s < 2 * 86400 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::{
        AcceleratedImageSpec, AcceleratedImageStatus, CheckStatus, ProgressStatus,
    };
    use k8s_openapi::api::core::v1::Node;

    fn task(name: &str, source: &str, phase: Phase) -> AcceleratedImage {
        let spec = AcceleratedImageSpec {
            source: source.to_owned(),
            target: None,
            platforms: Vec::new(),
            secret_name: None,
        };
        let mut task = AcceleratedImage::new(name, spec);
        task.metadata.generation = Some(1);
        task.status = Some(AcceleratedImageStatus {
            phase,
            observed_generation: 1,
            message: "why".to_owned(),
            ..AcceleratedImageStatus::default()
        });
        task
    }

    #[test]
    fn names_follow_from_images() {
        for (source, name) in [
            ("h:5000/team/app:v1.2", "app-v1-2"),
            ("h/app", "app"),
            ("h/a__b:V1_", "a--b-v1"),
            ("h/app:v1@sha256:00", "app-v1"),
        ] {
            assert_eq!(name_for(source), name);
        }
        let long = format!("h/a:{}", "x".repeat(128));
        assert_eq!(name_for(&long).len(), MAX_NAME);
    }

    #[test]
    fn a_task_is_found_by_its_name_or_either_image() {
        let tasks = [
            task("one", "h/a:latest", Phase::Ready),
            task("two", "h/b:v1", Phase::Ready),
            task("three", "h/b:v1", Phase::Ready),
        ];
        let found = |name: &str| -> Vec<_> {
            named(&tasks, name)
                .iter()
                .map(|task| task.name_any())
                .collect()
        };
        assert_eq!(found("one"), ["one"]);
        assert_eq!(found("h/a"), ["one"]);
        assert_eq!(found("h/a:latest-acc"), ["one"]);
        assert_eq!(found("h/b:v1"), ["two", "three"]);
        assert!(found("h/c").is_empty());
    }

    #[test]
    fn who_waits_goes_by_what_is_said_of_the_newest_version() {
        let mut image = task("a", "h/a", Phase::Ready);
        assert_eq!(waiting(&image), Waiting::Done);
        image.metadata.generation = Some(2);
        assert_eq!(waiting(&image), Waiting::GoesOn);
        let failed = task("a", "h/a", Phase::CreateError);
        assert_eq!(waiting(&failed), Waiting::Failed("why".to_owned()));
        assert_eq!(waiting(&task("a", "h/a", Phase::Unknown)), Waiting::GoesOn);
    }

    #[test]
    fn turning_on_ends_what_would_turn_off_for_good_but_not_if_that_is_under_way() {
        let spec = json!({"ufs": {"claimName": "u"}});
        let mut there: ImageAcceleration = serde_json::from_value(json!({
            "apiVersion": "image-accel.io/v1alpha1", "kind": "ImageAcceleration",
            "metadata": {"name": "cluster"}, "spec": {"ufs": {"claimName": "u"}, "purge": true},
        }))
        .unwrap();
        for known in [None, Some(&there)] {
            let on = enabled(known, &spec, Timestamp::UNIX_EPOCH).unwrap();
            assert_eq!(on["metadata"]["name"], "cluster");
            assert_eq!(on["spec"]["ufs"]["claimName"], "u");
            assert_eq!(on["spec"]["purge"], false);
        }
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::UNIX_EPOCH);
        there.metadata.deletion_timestamp = Some(now);
        let refused = enabled(Some(&there), &spec, Timestamp::UNIX_EPOCH).unwrap_err();
        assert!(refused.contains("is being turned off"), "{refused}");
    }

    #[test]
    fn turning_on_again_tries_again_what_was_wrong_and_waits_for_that() {
        let spec = json!({"ufs": {"claimName": "u"}});
        let now = Timestamp::UNIX_EPOCH;
        let mut there: ImageAcceleration = serde_json::from_value(json!({
            "apiVersion": "image-accel.io/v1alpha1", "kind": "ImageAcceleration",
            "metadata": {"name": "cluster", "generation": 3, "uid": "u"}, "spec": spec,
        }))
        .unwrap();
        let say = |there: &mut ImageAcceleration, status, passed| {
            let of = fingerprint(there);
            let said = there.status.get_or_insert_default();
            said.check = Some(CheckStatus {
                of,
                passed,
                failures: u32::from(!passed),
                ..CheckStatus::default()
            });
            let says = ["Ready", status, "UfsReady", "why"];
            conditions::set(&mut said.conditions, says, Some(3), now);
        };
        assert_eq!(enabling(&there).0, Waiting::GoesOn);
        say(&mut there, "False", false);
        assert_eq!(enabling(&there).0, Waiting::Failed("why".to_owned()));

        // The same settings: the generation stays.
        let again = enabled(Some(&there), &spec, now).unwrap();
        let asked = again["metadata"]["annotations"][TRY_AGAIN].as_str();
        let asked = asked.unwrap().to_owned();
        there.annotations_mut().insert(TRY_AGAIN.to_owned(), asked);
        assert_eq!(enabling(&there).0, Waiting::GoesOn);
        say(&mut there, "True", true);
        assert_eq!(enabling(&there).0, Waiting::Done);
        // Nothing is wrong: nothing is tried again.
        let again = enabled(Some(&there), &spec, now).unwrap();
        assert_eq!(again["metadata"]["annotations"], Value::Null);
    }

    #[test]
    fn tables_stand_in_columns() {
        let mut long = task("a-long-name", "h/a", Phase::Creating);
        long.status.as_mut().unwrap().progress = Some(ProgressStatus {
            text: "1/2 layers".to_owned(),
            ..ProgressStatus::default()
        });
        let tasks = [task("a", "h/a:v1", Phase::Ready), long];
        let shown = table(&tasks, false, true, Timestamp::UNIX_EPOCH);
        let lines: Vec<_> = shown.lines().collect();
        assert_eq!(lines.len(), 3);
        let at = lines[0].find("PHASE").unwrap();
        assert!(lines[1][at..].starts_with("Ready") && lines[2][at..].starts_with("Creating"));
        assert!(lines[2].contains("1/2 layers") && lines[2].ends_with("why"));
    }

    #[test]
    fn a_table_shows_which_nodes_use_an_image() {
        let mut used = task("a", "h/a:v1", Phase::Ready);
        let status = used.status.as_mut().unwrap();
        status.used_by = (0..100).map(|number| format!("n{number:03}")).collect();
        status.used_by_count = Some(120);
        let mut free = task("b", "h/b:v1", Phase::Ready);
        free.status.as_mut().unwrap().used_by_count = Some(0);
        let tasks = [used, free, task("c", "h/c:v1", Phase::Creating)];
        let cells = |wide, column: &str, width: usize| -> Vec<String> {
            let shown = table(&tasks, false, wide, Timestamp::UNIX_EPOCH);
            let at = shown.find(column).unwrap();
            // Lines end with what they say last.
            let cell = |line: &str| {
                let cell: String = line.chars().skip(at).take(width).collect();
                cell.trim_end().to_owned()
            };
            shown.lines().skip(1).map(cell).collect()
        };
        assert_eq!(cells(false, "USED BY", 7), ["120", "0", ""]);
        let names = "n000, n001, n002, n003, n004 and 115 more";
        assert_eq!(cells(true, "NODES", names.len()), [names, "", ""]);
    }

    #[test]
    fn a_service_is_shown_with_who_works_for_it() {
        let mut service: ImageAcceleration = serde_json::from_value(json!({
            "apiVersion": "image-accel.io/v1alpha1", "kind": "ImageAcceleration",
            "metadata": {"name": "cluster"}, "spec": {"ufs": {"claimName": "u"}},
            "status": {"images": 3, "stored": "1.0 MiB", "nodesText": "1/2"},
        }))
        .unwrap();
        let status = service.status.as_mut().unwrap();
        for (type_, message) in [
            ("Ready", "all is well"),
            (UFS_READY, ""),
            (CONTROLLER_READY, ""),
        ] {
            let says = [type_, "True", "Why", message];
            conditions::set(&mut status.conditions, says, None, Timestamp::UNIX_EPOCH);
        }
        let state = |leader: Result<&Leader, &String>, service: Option<&ImageAcceleration>| {
            let controller = ControllerState::of(leader);
            let service = service.cloned();
            ServiceState {
                controller,
                service,
            }
        };
        let shown = |leader, service| -> Vec<String> {
            let table = service_table(&state(leader, service));
            table.lines().map(str::to_owned).collect()
        };
        let one = Leader::One("one-1".to_owned());
        let head = "READY   UFS    CONTROLLER   NODES   IMAGES   STORED    MESSAGE";
        let well = "True    True   True         1/2     3        1.0 MiB   all is well";
        let expected = [head, well, "controller: one-1 leads"];
        assert_eq!(shown(Ok(&one), Some(&service)), expected);
        // It was well when somebody could say so; where UFS is has not changed by that.
        let none = Leader::None(Some(Timestamp::UNIX_EPOCH));
        let dead = "False   True   False        1/2     3        1.0 MiB   no controller has said anything lately";
        let since = "controller: not running since 1970-01-01T00:00:00Z";
        assert_eq!(shown(Ok(&none), Some(&service)), [head, dead, since]);
        // Whoever may not see the Lease sees the rest.
        let forbidden = "leases is forbidden".to_owned();
        let unknown = "controller: not known: leases is forbidden";
        let expected = [head, well, unknown];
        assert_eq!(shown(Err(&forbidden), Some(&service)), expected);
        let off = "acceleration is off: there is no ImageAcceleration called cluster";
        assert_eq!(shown(Ok(&one), None), [off, "controller: one-1 leads"]);

        let json = |leader| serde_json::to_value(state(leader, Some(&service))).unwrap();
        let dead = json(Ok(&none));
        let expected = json!({"running": false, "since": "1970-01-01T00:00:00Z", "message": since});
        assert_eq!(dead["controller"], expected);
        // As it is in the cluster.
        assert_eq!(dead["service"]["status"]["images"], 3);
        let expected =
            json!({"running": true, "leader": "one-1", "message": "controller: one-1 leads"});
        assert_eq!(json(Ok(&one))["controller"], expected);
        assert_eq!(json(Err(&forbidden))["controller"]["running"], Value::Null);
    }

    #[test]
    fn nodes_are_shown_with_why_they_cannot() {
        const KEY: &str = "node.uk8s.ucloud.cn/uimgacc";
        let node = |name: &str, labels: Value| -> Node {
            serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}})).unwrap()
        };
        let lease = |name: &str, annotations: Value| -> Lease {
            let name = format!("accel-node-{name}");
            let lease = json!({"metadata": {"name": name, "annotations": annotations}});
            serde_json::from_value(lease).unwrap()
        };
        let says = |healthy: &str, message: &str| json!({"image-accel.io/healthy": healthy, "image-accel.io/message": message});
        let pool = json!({"pool": "x"});
        let nodes = [
            node("well", json!({"pool": "x", KEY: "true"})),
            node("ill", pool.clone()),
            node("silent", pool.clone()),
            node("new", pool.clone()),
            node("bare", pool),
            node("out", json!({"pool": "x", KEY: "false"})),
            node("other", json!({})),
        ];
        let leases = [
            lease("well", says("true", "reads")),
            lease("ill", says("false", "UFS is away")),
            lease("silent", says("true", "reads")),
            lease("new", json!({})),
            lease("out", says("true", "reads")),
        ];
        let spec = json!({"ufs": {"claimName": "u"}, "nodes": {"selector": {"pool": "x"}}});
        let mut service =
            ImageAcceleration::new(SERVICE_NAME, serde_json::from_value(spec).unwrap());
        let table = |nodes: &[Node], service: Option<&ImageAcceleration>| {
            let states = nodes.iter().map(|node| node_state(node, &leases, service));
            nodes_table(&states.collect::<Vec<_>>())
        };
        let shown = table(&nodes, Some(&service));
        let lines: Vec<_> = shown.lines().map(str::trim_end).collect();
        let expected = [
            "NAME     READY   MESSAGE",
            "well     yes     reads",
            "ill      no      UFS is away",
            "silent   no      its agent is silent, or has just begun",
            "new      no      has not said anything yet",
            "bare     no      says nothing: it has no agent",
            "out      no      is kept out: node.uk8s.ucloud.cn/uimgacc has another value than true",
            "other    no      is not meant: spec.nodes.selector",
        ];
        assert_eq!(lines, expected);
        let off = table(&nodes[..1], None);
        assert!(off.contains("no      acceleration is off"), "{off}");
        // The cluster does not take the label.
        let refused = json!({"conditions": [{"type": LABELLING, "status": "False",
            "reason": "Refused", "message": "n1: no", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
        service.status = serde_json::from_value(refused).unwrap();
        let shown = table(&nodes[2..3], Some(&service));
        assert!(
            shown.contains("no      cannot be labelled: n1: no"),
            "{shown}"
        );
        // It is there only until all is removed that was made.
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::UNIX_EPOCH);
        service.metadata.deletion_timestamp = Some(now);
        assert_eq!(table(&nodes[..1], Some(&service)), off);
    }
}
