//! Which nodes use a task's image, as a pure function of what nodes say.
//!
//! Each node says in its own Lease (see [`crate::labels`]) what containers run on there. It is
//! taken at its word for as long as the cluster has a node of that name, however long ago that
//! was: of a node that is silent nobody knows better, and its containers go on. A Lease of a node
//! that is no more says nothing. That is for people; whether layers may be removed is decided by
//! what nodes say on UFS, which is in roots, all of them, and of other clusters, too.

use crate::labels::lease_name;
use crate::resource::{AcceleratedImage, AcceleratedImageStatus};
use accel_oci::{ChainId, Digest};
use k8s_openapi::api::coordination::v1::Lease;
use kube::ResourceExt as _;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// On a node's Lease: what containers run on, by the first 16 digits of the chain IDs of
/// the uppermost layers, in order, with spaces between them. There are 512 at most:
/// the first ones, and `+` with how many are left out.
pub const USED: &str = "image-accel.io/used-chain-ids";

/// How many hexadecimal digits of a chain ID are told: nobody has two images by chance in which
/// they are the same, and whoever makes two on purpose has one look used that is not.
const DIGITS: usize = 16;
/// How many chain IDs a node tells: 8.5 KiB. A node has some hundred pods at most, and all
/// annotations of an object together may have 256 KiB.
const MAX_CHAIN_IDS: usize = 512;
/// How many nodes a task's status names.
const MAX_SHOWN: usize = 100;

/// What a node tells of these.
pub fn told(used: &BTreeSet<ChainId>) -> String {
    // The order of prefixes is that of chain IDs.
    let mut words: Vec<_> = used.iter().map(prefix).collect();
    words.dedup();
    let more = words.len().saturating_sub(MAX_CHAIN_IDS);
    words.truncate(MAX_CHAIN_IDS);
    if more > 0 {
        words.push(format!("+{more}"));
    }
    words.join(" ")
}

fn prefix(chain_id: &ChainId) -> String {
    let mut hex = chain_id.0.hex();
    hex.truncate(DIGITS);
    hex
}

/// Which nodes use what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Users(BTreeMap<String, BTreeSet<String>>);

/// Nodes that use a task's image, as its status names them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UsedBy {
    /// The first of their names.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub used_by: Vec<String>,
    /// How many they are; none if that cannot be known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub used_by_count: Option<u32>,
}

impl UsedBy {
    fn is_said(&self, status: &AcceleratedImageStatus) -> bool {
        (&self.used_by, self.used_by_count) == (&status.used_by, status.used_by_count)
    }
}

impl Users {
    /// As these Leases say, of the nodes of these names that the cluster has.
    pub fn of<'a>(leases: &[Lease], nodes: impl IntoIterator<Item = &'a str>) -> Self {
        let nodes: BTreeSet<_> = nodes.into_iter().collect();
        let mut users = Self::default();
        for lease in leases {
            let name = lease.name_any();
            let node = name.strip_prefix(&lease_name(""));
            let Some(node) = node.filter(|node| nodes.contains(node)) else {
                continue;
            };
            let used = lease.annotations().get(USED);
            // Whoever has written that may have written anything.
            let words = used.into_iter().flat_map(|used| used.split(' '));
            for word in words.take(MAX_CHAIN_IDS).filter(|word| is_prefix(word)) {
                let of_word = users.0.entry(word.to_owned()).or_default();
                of_word.insert(node.to_owned());
            }
        }
        users
    }

    /// Who uses this task's image. Of one that was never Ready it is not known which layers it
    /// has.
    pub fn of_task(&self, status: &AcceleratedImageStatus) -> UsedBy {
        if status.chain_ids.is_empty() {
            return UsedBy::default();
        }
        let chain_ids = status.chain_ids.iter();
        let digests = chain_ids.filter_map(|text| text.parse::<Digest>().ok());
        let nodes = digests.filter_map(|digest| self.0.get(&prefix(&ChainId(digest))));
        let nodes: BTreeSet<_> = nodes.flatten().collect();
        UsedBy {
            used_by_count: Some(u32::try_from(nodes.len()).unwrap_or(u32::MAX)),
            used_by: nodes.into_iter().take(MAX_SHOWN).cloned().collect(),
        }
    }
}

fn is_prefix(word: &str) -> bool {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    word.len() == DIGITS && word.bytes().all(digit)
}

/// Tasks of which something else has to be said than their status says, and what.
pub fn changes<'a>(
    tasks: impl IntoIterator<Item = &'a AcceleratedImage>,
    users: &Users,
) -> Vec<(&'a AcceleratedImage, UsedBy)> {
    let mut changes = Vec::new();
    for task in tasks {
        let Some(status) = &task.status else { continue };
        let now = users.of_task(status);
        if !now.is_said(status) {
            changes.push((task, now));
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chain(name: &str) -> ChainId {
        ChainId(Digest::of(name.as_bytes()))
    }

    fn chains(names: &[&str]) -> BTreeSet<ChainId> {
        names.iter().map(|name| chain(name)).collect()
    }

    fn lease(node: &str, used: &str) -> Lease {
        serde_json::from_value(json!({
            "metadata": {"name": format!("accel-node-{node}"), "annotations": {USED: used}},
            // That was long ago.
            "spec": {"renewTime": "2001-01-01T00:00:00.000000Z"},
        }))
        .unwrap()
    }

    /// A task that has images with these on top.
    fn task(tops: &[&str]) -> AcceleratedImage {
        let spec = serde_json::from_value(json!({"source": "h/a"})).unwrap();
        let mut task = AcceleratedImage::new("a", spec);
        task.status = Some(AcceleratedImageStatus {
            chain_ids: tops.iter().map(|top| chain(top).to_string()).collect(),
            ..AcceleratedImageStatus::default()
        });
        task
    }

    fn of_task(users: &Users, tops: &[&str]) -> (Vec<String>, Option<u32>) {
        let UsedBy {
            used_by,
            used_by_count,
        } = users.of_task(task(tops).status.as_ref().unwrap());
        (used_by, used_by_count)
    }

    #[test]
    fn what_a_node_tells_is_found_again_by_the_tasks_whose_image_it_is() {
        let leases = [
            lease("n2.x", &told(&chains(&["one", "two"]))),
            lease("n1", &told(&chains(&["one"]))),
            lease("idle", &told(&chains(&[]))),
            // The controller's own, and of a node of an older version.
            serde_json::from_value(json!({"metadata": {"name": "accel-controller"}})).unwrap(),
            serde_json::from_value(json!({"metadata": {"name": "accel-node-old"}})).unwrap(),
        ];
        let users = Users::of(&leases, ["idle", "n1", "n2.x", "old"]);
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(of_task(&users, &["one"]), (names(&["n1", "n2.x"]), Some(2)));
        assert_eq!(of_task(&users, &["two"]), (names(&["n2.x"]), Some(1)));
        assert_eq!(of_task(&users, &["none"]), (vec![], Some(0)));
        // Of several platforms; a node counts once.
        let both = of_task(&users, &["two", "none", "one"]);
        assert_eq!(both, (names(&["n1", "n2.x"]), Some(2)));
        assert_eq!(of_task(&users, &[]), (vec![], None), "nobody can know");
    }

    #[test]
    fn a_node_that_is_no_more_uses_nothing_and_a_silent_one_what_it_has_said() {
        let leases = [lease("n1", &told(&chains(&["one"])))];
        let there = Users::of(&leases, ["n1"]);
        assert_eq!(of_task(&there, &["one"]).1, Some(1));
        let gone = Users::of(&leases, ["n2"]);
        assert_eq!(of_task(&gone, &["one"]).1, Some(0));
    }

    #[test]
    fn there_is_an_end_to_what_a_node_tells_and_what_a_task_names() {
        assert_eq!(told(&BTreeSet::new()), "");
        let one = chains(&["one"]);
        assert_eq!(told(&one), chain("one").0.hex()[..DIGITS]);
        let number = |number: usize| chain(&number.to_string());
        let most: BTreeSet<_> = (0..MAX_CHAIN_IDS).map(number).collect();
        assert!(!told(&most).contains('+'));
        let more: BTreeSet<_> = (0..MAX_CHAIN_IDS + 7).map(number).collect();
        let text = told(&more);
        assert!(text.ends_with(" +7") && text.len() < 9 * 1024, "{text}");
        let users = Users::of(&[lease("n", &text)], ["n"]);
        assert_eq!(users.0.len(), MAX_CHAIN_IDS);
        let known = |chain_id: &ChainId| users.0.contains_key(&prefix(chain_id));
        assert!(known(more.first().unwrap()) && !known(more.last().unwrap()));
        // What is none is not heard, and no more than that is.
        let digits = "0123456789abcdef";
        let odd = format!("{digits} {digits}0 0123456789ABCDEF +9  \u{1b}[2J");
        assert_eq!(Users::of(&[lease("n", &odd)], ["n"]).0.len(), 1);
        let long = (0..2 * MAX_CHAIN_IDS).map(|number| format!("{number:016x}"));
        let long = long.collect::<Vec<_>>().join(" ");
        let users = Users::of(&[lease("n", &long)], ["n"]);
        assert_eq!(users.0.len(), MAX_CHAIN_IDS);

        let nodes: Vec<_> = (0..150).map(|number| format!("n{number:03}")).collect();
        let leases: Vec<_> = nodes.iter().map(|node| lease(node, &told(&one))).collect();
        let users = Users::of(&leases, nodes.iter().map(String::as_str));
        let (names, count) = of_task(&users, &["one"]);
        assert_eq!((&names[..], count), (&nodes[..MAX_SHOWN], Some(150)));
    }

    #[test]
    fn a_status_is_written_when_something_else_has_to_be_said() {
        let leases = [lease("n1", &told(&chains(&["one"])))];
        let users = Users::of(&leases, ["n1"]);
        let mut used = task(&["one"]);
        let said = serde_json::to_value(&changes([&used], &users)[0].1).unwrap();
        assert_eq!(said, json!({"usedBy": ["n1"], "usedByCount": 1}));
        let status = used.status.as_mut().unwrap();
        (status.used_by, status.used_by_count) = (vec!["n1".to_owned()], Some(1));
        assert_eq!(changes([&used], &users), []);
        // Who plans never writes it: whoever has written a field keeps it there.
        let planned = serde_json::to_value(used.status.as_ref().unwrap().planned()).unwrap();
        assert_eq!(
            (&planned["usedBy"], &planned["usedByCount"]),
            (&json!(null), &json!(null))
        );
        assert!(planned["chainIds"].is_array());
        let free = Users::default();
        let said = serde_json::to_value(&changes([&used], &free)[0].1).unwrap();
        assert_eq!(said, json!({"usedByCount": 0}));
        // It is another image by now, and nobody knows yet which layers that has.
        used.status.as_mut().unwrap().chain_ids.clear();
        let said = serde_json::to_value(&changes([&used], &users)[0].1).unwrap();
        assert_eq!(said, json!({}));
        // Nothing is said of what the controller has not looked at.
        used.status = None;
        assert_eq!(changes([&used], &users), []);
    }
}
