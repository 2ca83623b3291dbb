//! Which nodes bear the label, as a pure function of what is observed.
//!
//! Each node says how it is in a Lease of its own, `accel-node-NAME` in the controller's
//! namespace, which is all that it may write (`accel-controller node`). Only the controller
//! changes nodes: one has the label exactly while it says that it can serve. A controller that
//! has just begun does not know whether what a Lease says is still so: until it has heard the
//! node itself, or the node has been silent for too long, it leaves a label as it is.
//!
//! While acceleration is on the label is the controller's, whoever gave it: `true` on a node
//! that cannot serve goes. A node on which it has another value is left alone, and gets
//! nothing: so somebody can keep a node out, and a key that something else needs is not
//! spoiled. Which label a node was given is in an annotation, so that it goes when
//! acceleration is turned off, or another label is configured.

use crate::resource::{ImageAccelerationSpec, NodesSpec};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::ResourceExt as _;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// On Leases of nodes, for whoever lists them.
pub const COMPONENT: (&str, &str) = ("app.kubernetes.io/component", "node-health");
/// On a node's Lease: `true` if it can serve.
pub const HEALTHY: &str = "image-accel.io/healthy";
/// On a node's Lease: what came of the last check.
pub const MESSAGE: &str = "image-accel.io/message";
/// On a node's Lease: `true` if it cannot serve because it cannot read from UFS.
pub const UFS_UNREAD: &str = "image-accel.io/ufs-unread";
/// On a node: which label it was given, so that it can be taken away.
const LABELLED: &str = "image-accel.io/labelled";
/// The label's value.
const YES: &str = "true";

/// The longest message of a node, in characters: no more is passed on, or shown.
pub(crate) const MAX_MESSAGE: usize = 500;

/// How long a node may say nothing: who tells may be started again meanwhile, and waits for a
/// check before it says anything.
const SILENCE: Duration = Duration::from_secs(18);

/// The name of a node's Lease.
pub fn lease_name(node: &str) -> String {
    format!("accel-node-{node}")
}

/// When each node's Lease was renewed, by the clock of this process: clocks of machines
/// differ.
#[derive(Debug, Default)]
pub struct Seen(HashMap<String, Sight>);

#[derive(Debug)]
struct Sight {
    /// What the Lease says of it.
    renewed: Option<MicroTime>,
    /// Since when it has been that.
    since: Instant,
    /// Whether it has been renewed before the eyes of this process.
    heard: bool,
}

/// Whether a node can serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It says so.
    Good,
    /// It says that it cannot, or nothing.
    Bad,
    /// It has said that it can, nobody knows how long ago.
    Unknown,
}

/// What a node says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    /// Whether it can serve.
    pub health: Health,
    /// Whether it cannot because it cannot read from UFS.
    pub ufs_unread: bool,
    /// What came of the last check.
    pub message: String,
}

impl Word {
    /// What the Lease says, whenever that was.
    pub fn of(lease: &Lease) -> Self {
        let says = |key: &str| lease.annotations().get(key).cloned().unwrap_or_default();
        // It is shown on terminals, and the node has written it.
        let message = says(MESSAGE).replace(char::is_control, " ");
        let healthy = says(HEALTHY) == YES;
        Self {
            health: match healthy {
                true => Health::Good,
                false => Health::Bad,
            },
            ufs_unread: !healthy && says(UFS_UNREAD) == YES,
            message: message.chars().take(MAX_MESSAGE).collect(),
        }
    }
}

impl Seen {
    /// What each node says now. One that is silent says nothing good; nor does one that has
    /// not been heard yet, but that it is ill counts at once.
    pub fn look(&mut self, leases: &[Lease], now: Instant) -> BTreeMap<String, Word> {
        let mut words = BTreeMap::new();
        for lease in leases {
            let name = lease.name_any();
            let Some(node) = name.strip_prefix(&lease_name("")) else {
                continue;
            };
            let renewed = lease.spec.as_ref().and_then(|spec| spec.renew_time.clone());
            let seen = self.0.entry(node.to_owned()).or_insert_with(|| Sight {
                renewed: renewed.clone(),
                since: now,
                heard: false,
            });
            if seen.renewed != renewed {
                *seen = Sight {
                    renewed,
                    since: now,
                    heard: true,
                };
            }
            let mut word = Word::of(lease);
            if seen.renewed.is_none() || now.duration_since(seen.since) > SILENCE {
                word = Word {
                    health: Health::Bad,
                    ufs_unread: false,
                    message: "its agent is silent".to_owned(),
                };
            } else if !seen.heard && word.health == Health::Good {
                word.health = Health::Unknown;
            }
            words.insert(node.to_owned(), word);
        }
        self.0.retain(|node, _| words.contains_key(node));
        words
    }
}

/// What there is to do.
#[derive(Debug, Default, PartialEq)]
pub struct Labels {
    /// What is to be taken from nodes, then what is to be given.
    pub changes: Vec<Change>,
    /// Nodes that are meant.
    pub nodes: u32,
    /// Those of them that can serve.
    pub ready: u32,
    /// Whether UFS is there for them.
    pub ufs: Ufs,
}

/// Whether UFS is there, as far as the nodes that are meant can tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Ufs {
    /// None of them can.
    #[default]
    Untold,
    /// One of them reads from it, or did a moment ago.
    Read,
    /// All that can tell cannot read from it. One of them, and what it says.
    Unread(String),
}

impl Ufs {
    /// As these nodes say: their names, and what each of them says.
    fn of(said: &[(&str, &Word)]) -> Self {
        let any = |health| said.iter().any(|(_, word)| word.health == health);
        let unread = said.iter().find(|(_, word)| word.ufs_unread);
        match unread {
            _ if any(Health::Good) => Self::Read,
            // One of them may read from it.
            _ if any(Health::Unknown) => Self::Untold,
            Some((node, word)) => Self::Unread(format!("{node}: {}", word.message)),
            None => Self::Untold,
        }
    }
}

/// The condition of the service that the cluster takes the label.
pub const LABELLING: &str = "NodesLabelled";

/// What came of a look at the nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Looked {
    /// Nodes that are meant.
    pub nodes: u32,
    /// Those of them that can serve, and have the label.
    pub ready: u32,
    /// Whether UFS is there for them.
    pub ufs: Ufs,
    /// The first node that could not be changed, and why.
    pub refused: Option<String>,
}

/// How a node is to be changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Its name.
    pub node: String,
    /// Whether it gets the label.
    pub gives: bool,
    /// A merge patch, which fails if the node is not any more what was decided about.
    pub patch: Value,
}

/// Whether nodes with these labels are to have the label.
pub fn is_meant(spec: &NodesSpec, labels: &BTreeMap<String, String>) -> bool {
    let mut wanted = spec.selector.iter();
    wanted.all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether a node with these labels has the label.
pub fn is_labelled(spec: &NodesSpec, labels: &BTreeMap<String, String>) -> bool {
    labels.get(&spec.label).is_some_and(|value| value == YES)
}

/// Whether somebody has given such a node the label with another value.
pub fn is_kept_out(spec: &NodesSpec, labels: &BTreeMap<String, String>) -> bool {
    labels.contains_key(&spec.label) && !is_labelled(spec, labels)
}

/// Decides. Without `service` no node has the label.
pub fn labels(
    nodes: &[ObjectMeta],
    words: &BTreeMap<String, Word>,
    service: Option<&ImageAccelerationSpec>,
) -> Labels {
    let mut labels = Labels::default();
    let nothing = BTreeMap::new();
    let spec = service.map(|service| &service.nodes);
    let mut said = Vec::new();
    for node in nodes {
        let Some(name) = &node.name else { continue };
        let has = node.labels.as_ref().unwrap_or(&nothing);
        let marks = node.annotations.as_ref().unwrap_or(&nothing);
        let given = marks.get(LABELLED).map(String::as_str);
        let meant = spec.filter(|spec| is_meant(spec, has));
        let word = words.get(name);
        let health = word.map_or(Health::Bad, |word| word.health);
        said.extend(meant.and(word).map(|word| (&**name, word)));
        let wanted = meant.filter(|spec| match health {
            Health::Good => !is_kept_out(spec, has),
            Health::Bad => false,
            Health::Unknown => is_labelled(spec, has),
        });
        labels.nodes += u32::from(meant.is_some());
        labels.ready += u32::from(wanted.is_some());
        let mut changes = serde_json::Map::new();
        let ours = given.into_iter().chain(spec.map(|spec| &*spec.label));
        for key in ours.filter(|key| has.get(*key).is_some_and(|value| value == YES)) {
            changes.insert(key.to_owned(), Value::Null);
        }
        if let Some(spec) = wanted {
            changes.insert(spec.label.clone(), json!(YES));
        }
        // What is there already.
        changes.retain(|key, value| has.get(key).map(String::as_str) != value.as_str());
        let mark = wanted.map(|spec| spec.label.as_str());
        if changes.is_empty() && given == mark {
            continue;
        }
        labels.changes.push(Change {
            node: name.clone(),
            gives: wanted.is_some(),
            patch: json!({"metadata": {
                "resourceVersion": node.resource_version,
                "labels": changes,
                "annotations": {LABELLED: mark},
            }}),
        });
    }
    labels.ufs = Ufs::of(&said);
    // Pods come to a node that cannot serve as long as it has the label.
    labels.changes.sort_by_key(|change| change.gives);
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::jiff::Timestamp;
    use std::slice::from_ref;

    const KEY: &str = "node.uk8s.ucloud.cn/uimgacc";

    fn service(more: Value) -> ImageAccelerationSpec {
        let mut spec = json!({"ufs": {"claimName": "ufs"}});
        spec["nodes"] = more;
        serde_json::from_value(spec).unwrap()
    }

    fn node(name: &str, labels: Value, annotations: Value) -> ObjectMeta {
        let mut meta = json!({"name": name, "resourceVersion": "7"});
        meta["labels"] = labels;
        meta["annotations"] = annotations;
        serde_json::from_value(meta).unwrap()
    }

    fn words(all: &[(&str, bool)]) -> BTreeMap<String, Word> {
        let word = |(node, healthy): &(&str, bool)| {
            let message = String::new();
            let health = match healthy {
                true => Health::Good,
                false => Health::Bad,
            };
            let ufs_unread = false;
            let word = Word {
                health,
                ufs_unread,
                message,
            };
            ((*node).to_owned(), word)
        };
        all.iter().map(word).collect()
    }

    fn change(node: &str, labels: Value, mark: Option<&str>) -> Change {
        let mut patch =
            json!({"metadata": {"resourceVersion": "7", "annotations": {LABELLED: mark}}});
        patch["metadata"]["labels"] = labels;
        Change {
            node: node.to_owned(),
            gives: mark.is_some(),
            patch,
        }
    }

    #[test]
    fn a_node_has_the_label_exactly_while_it_can_serve() {
        let spec = service(json!({}));
        let plain = node("a", json!({}), json!({}));
        let labelled = node("b", json!({KEY: "true"}), json!({LABELLED: KEY}));
        let nodes = [plain, labelled];
        let on = labels(&nodes, &words(&[("a", true), ("b", true)]), Some(&spec));
        assert_eq!((on.nodes, on.ready), (2, 2));
        assert_eq!(on.changes, [change("a", json!({KEY: "true"}), Some(KEY))]);
        // It cannot, or says nothing, or acceleration is off.
        for (said, spec) in [
            (words(&[("b", false)]), Some(&spec)),
            (words(&[]), Some(&spec)),
            (words(&[("a", true), ("b", true)]), None),
        ] {
            let found = labels(&nodes, &said, spec);
            assert_eq!(found.changes, [change("b", json!({KEY: null}), None)]);
            assert_eq!(found.ready, 0);
        }
        // What is taken away comes first.
        let both = labels(&nodes, &words(&[("a", true)]), Some(&spec));
        let order: Vec<_> = both.changes.iter().map(|change| &*change.node).collect();
        assert_eq!(order, ["b", "a"]);
    }

    #[test]
    fn nodes_that_are_not_meant_do_not_get_it() {
        let spec = service(json!({"selector": {"pool": "x"}, "label": "h/fast"}));
        let nodes = [
            node("in", json!({"pool": "x"}), json!({})),
            node("out", json!({"pool": "y"}), json!({})),
            // From when another label was meant.
            node(
                "old",
                json!({"pool": "x", KEY: "true"}),
                json!({LABELLED: KEY}),
            ),
            // From when it was meant.
            node(
                "left",
                json!({"pool": "y", "h/fast": "true"}),
                json!({LABELLED: "h/fast"}),
            ),
        ];
        let all = words(&[("in", true), ("out", true), ("old", true), ("left", true)]);
        let found = labels(&nodes, &all, Some(&spec));
        assert_eq!((found.nodes, found.ready), (2, 2));
        let expected = [
            change("left", json!({"h/fast": null}), None),
            change("in", json!({"h/fast": "true"}), Some("h/fast")),
            change("old", json!({KEY: null, "h/fast": "true"}), Some("h/fast")),
        ];
        assert_eq!(found.changes, expected);
    }

    #[test]
    fn labels_that_others_have_changed() {
        let spec = service(json!({}));
        let found = |labels_: Value, marks: Value, healthy, spec| {
            let nodes = [node("n", labels_, marks)];
            labels(&nodes, &words(&[("n", healthy)]), spec)
        };
        let changes = |labels_, marks, healthy| found(labels_, marks, healthy, Some(&spec)).changes;
        let (ours, none) = (json!({LABELLED: KEY}), json!({}));
        let (on, off) = (
            change("n", json!({KEY: "true"}), Some(KEY)),
            change("n", json!({KEY: null}), None),
        );
        // Taken away: it is given again, or forgotten.
        assert_eq!(changes(json!({}), ours.clone(), true), [on]);
        let forgotten = change("n", json!({}), None);
        assert_eq!(
            changes(json!({}), ours.clone(), false),
            from_ref(&forgotten)
        );
        // Given by hand: it goes with the node's health like any other.
        let adopted = change("n", json!({}), Some(KEY));
        assert_eq!(changes(json!({KEY: "true"}), none.clone(), true), [adopted]);
        assert_eq!(changes(json!({KEY: "true"}), none.clone(), false), [off]);
        // Another value is somebody's will, or something else.
        let kept_out = found(json!({KEY: "false"}), none.clone(), true, Some(&spec));
        assert_eq!((kept_out.nodes, kept_out.ready), (1, 0));
        assert_eq!(kept_out.changes, []);
        for healthy in [true, false] {
            let changed = changes(json!({KEY: "no"}), ours.clone(), healthy);
            assert_eq!(changed, from_ref(&forgotten));
        }
        // Nobody asks for what others gave while acceleration is off.
        assert_eq!(found(json!({KEY: "true"}), none, true, None).changes, []);
    }

    #[test]
    fn ufs_is_away_when_nobody_can_read_from_it_who_can_tell() {
        let word = |health, ufs_unread| Word {
            health,
            ufs_unread,
            message: "why".to_owned(),
        };
        let unread = word(Health::Bad, true);
        let other = word(Health::Bad, false);
        let good = word(Health::Good, false);
        let unheard = word(Health::Unknown, false);
        let spec = service(json!({"selector": {"pool": "x"}}));
        let nodes = [
            node("a", json!({"pool": "x"}), json!({})),
            node("b", json!({"pool": "x"}), json!({})),
            node("others", json!({}), json!({})),
        ];
        let away = Ufs::Unread("b: why".to_owned());
        for (a, b, expected) in [
            (None, None, Ufs::Untold),
            (None, Some(&other), Ufs::Untold),
            (None, Some(&unread), away.clone()),
            (Some(&other), Some(&unread), away),
            (Some(&unread), Some(&good), Ufs::Read),
            (Some(&unheard), Some(&good), Ufs::Read),
            (Some(&unheard), Some(&unread), Ufs::Untold),
        ] {
            let mut words = BTreeMap::new();
            for (name, word) in [("a", a), ("b", b), ("others", Some(&unread))] {
                words.extend(word.map(|word| (name.to_owned(), word.clone())));
            }
            assert_eq!(labels(&nodes, &words, Some(&spec)).ufs, expected);
            assert_eq!(labels(&nodes, &words, None).ufs, Ufs::Untold);
        }
    }

    #[test]
    fn only_a_node_that_cannot_serve_says_that_it_cannot_read() {
        for (healthy, unread, expected) in [
            ("false", Some("true"), true),
            ("false", Some("false"), false),
            // Of an older version.
            ("false", None, false),
            ("true", Some("true"), false),
        ] {
            let mut annotations = json!({HEALTHY: healthy});
            if let Some(unread) = unread {
                annotations[UFS_UNREAD] = json!(unread);
            }
            let lease = json!({"metadata": {"annotations": annotations}});
            let lease = serde_json::from_value(lease).unwrap();
            assert_eq!(Word::of(&lease).ufs_unread, expected);
        }
    }

    #[test]
    fn what_a_node_says_cannot_change_a_terminal() {
        let lease: Lease = serde_json::from_value(json!({
            "metadata": {"annotations": {HEALTHY: "true", MESSAGE: "a\u{1b}[2Jb\nc"}},
        }))
        .unwrap();
        let word = Word::of(&lease);
        let expected = (Health::Good, "a [2Jb c");
        assert_eq!((word.health, &*word.message), expected);
    }

    fn lease(second: Option<i64>, healthy: bool) -> Lease {
        let time = second.map(|second| MicroTime(Timestamp::from_second(second).unwrap()));
        let healthy = healthy.to_string();
        serde_json::from_value(json!({
            "metadata": {"name": "accel-node-n.x", "annotations": {HEALTHY: healthy}},
            "spec": {"renewTime": time},
        }))
        .unwrap()
    }

    #[test]
    fn a_silent_node_counts_as_one_that_cannot_serve() {
        let start = Instant::now();
        let mut seen = Seen::default();
        let mut at = |second: Option<i64>, after: u64| {
            let now = start + Duration::from_secs(after);
            seen.look(&[lease(second, true)], now)["n.x"].health
        };
        assert_eq!(at(None, 0), Health::Bad, "it has never said anything");
        assert_eq!(at(Some(5), 1), Health::Good);
        assert_eq!(at(Some(5), 19), Health::Good);
        assert_eq!(at(Some(5), 20), Health::Bad);
        assert_eq!(at(Some(6), 21), Health::Good);
        // Of one whose Lease was removed nothing is remembered.
        assert!(seen.look(&[], start).is_empty());
        assert_eq!(seen.0.len(), 0);
    }

    #[test]
    fn what_was_said_before_this_process_looked_gives_no_label_and_takes_none() {
        let start = Instant::now();
        let at = |seen: &mut Seen, second: i64, healthy: bool, after: u64| {
            let now = start + Duration::from_secs(after);
            seen.look(&[lease(Some(second), healthy)], now)
        };
        let health = |words: BTreeMap<String, Word>| words["n.x"].health;
        // The node may be long gone.
        let seen = &mut Seen::default();
        let unknown = at(seen, 5, true, 0);
        assert_eq!(unknown["n.x"].health, Health::Unknown);
        assert_eq!(health(at(seen, 5, true, 18)), Health::Unknown);
        assert_eq!(health(at(seen, 5, true, 19)), Health::Bad);
        // It is there.
        let seen = &mut Seen::default();
        at(seen, 5, true, 0);
        assert_eq!(health(at(seen, 9, true, 3)), Health::Good);
        // That it is ill is believed at once.
        assert_eq!(health(at(&mut Seen::default(), 5, false, 0)), Health::Bad);

        let spec = service(json!({}));
        let with = |has: Value, marks: Value| {
            let found = labels(&[node("n.x", has, marks)], &unknown, Some(&spec));
            (found.ready, found.changes)
        };
        assert_eq!(with(json!({}), json!({})), (0, vec![]));
        let labelled = with(json!({KEY: "true"}), json!({LABELLED: KEY}));
        assert_eq!(labelled, (1, vec![]));
        assert_eq!(with(json!({KEY: "no"}), json!({})), (0, vec![]));
        // Another label is meant by now: the old one goes, the new one waits.
        let other = service(json!({"label": "h/fast"}));
        let old = [node("n.x", json!({KEY: "true"}), json!({LABELLED: KEY}))];
        let found = labels(&old, &unknown, Some(&other));
        assert_eq!(found.changes, [change("n.x", json!({KEY: null}), None)]);
    }
}
