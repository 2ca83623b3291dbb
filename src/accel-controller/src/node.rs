//! `accel-controller node`: tells the cluster how this node is.
//!
//! It reads what the agent (`accel-snapshotter agent --health`) has written, and writes one
//! Lease, the node's own. It has no right to anything else, and nobody else has its right.

use crate::labels::{COMPONENT, HEALTHY, MAX_MESSAGE, MESSAGE, UFS_UNREAD, lease_name};
use crate::users::{self, USED};
use crate::yaml;
use accel_oci::ChainId;
use accel_ufs::UfsError;
use accel_ufs::health::{Health, SILENCE};
use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// How often to look at the agent's file.
const LOOK: Duration = Duration::from_secs(1);
/// How often to say the same again.
const RENEW: Duration = Duration::from_secs(4);
/// How many checks there have to be of an agent that was silent before it is believed again.
const SURE: u64 = 2;
/// The longest name of a node, in bytes: names of objects have at most 253.
const MAX_NODE: usize = 240;

/// What is told.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Word {
    /// Whether the node can serve.
    healthy: bool,
    /// Whether it cannot because it cannot read from UFS.
    ufs_unread: bool,
    /// Why not.
    message: String,
    /// What containers run on, unless that is not known: then what was told before stays.
    used: Option<BTreeSet<ChainId>>,
}

impl Word {
    /// That there is no agent to be heard.
    fn silent(message: impl Into<String>) -> Self {
        Self {
            healthy: false,
            ufs_unread: false,
            message: message.into(),
            used: None,
        }
    }
}

/// What the agent's file has said so far.
#[derive(Debug)]
struct Listener {
    /// The number of the last check, and since when there has been no other one.
    last: Option<(u64, Instant)>,
    doubt: Doubt,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doubt {
    /// What it says counts.
    None,
    /// The file was there before: its agent may be long gone, and may have only begun again.
    Stale,
    /// The agent was silent, and has to check so many times more.
    Silent(u64),
}

impl Listener {
    const fn new() -> Self {
        Self {
            last: None,
            doubt: Doubt::Stale,
        }
    }

    /// What is to be told; none as long as it is not known whether the agent is there.
    fn hear(&mut self, read: Result<Health, UfsError>, now: Instant) -> Option<Word> {
        let health = match read {
            Ok(health) => health,
            Err(error) => {
                *self = Self::new();
                return Some(Word::silent(format!("the agent says nothing: {error}")));
            }
        };
        let (last, since) = *self.last.get_or_insert((health.checks, now));
        // One that has begun from nothing counts from nothing.
        let more = health.checks.checked_sub(last).unwrap_or(health.checks);
        if more > 0 {
            self.last = Some((health.checks, now));
            self.doubt = match self.doubt {
                Doubt::Silent(left) if left > more => Doubt::Silent(left - more),
                _ => Doubt::None,
            };
        } else if now.duration_since(since) > SILENCE {
            self.doubt = Doubt::Silent(SURE);
        }
        match self.doubt {
            Doubt::None => Some(Word {
                healthy: health.healthy,
                ufs_unread: !health.healthy && health.ufs_unread,
                message: health.message,
                used: health.used_chain_ids,
            }),
            Doubt::Stale => None,
            Doubt::Silent(SURE) => Some(Word::silent("the agent has stopped checking")),
            Doubt::Silent(_) => Some(Word::silent("the agent has only begun to check again")),
        }
    }
}

/// Works until the process ends: what goes wrong may pass. The same is said again every
/// four seconds, something else within one.
pub async fn run(client: Client, namespace: &str, node: &str, file: &Path) {
    let leases = Api::<Lease>::namespaced(client, namespace);
    let mut listener = Listener::new();
    let mut told: Option<(Word, Instant)> = None;
    // What goes wrong is told when it begins, not every time.
    let mut wrong = String::new();
    loop {
        if let Some(word) = listener.hear(Health::read(file), Instant::now()) {
            let changed = told.as_ref().is_none_or(|(last, _)| *last != word);
            let due = told.as_ref().is_none_or(|(_, at)| at.elapsed() >= RENEW);
            if changed || due {
                match tell(&leases, node, &word).await {
                    Ok(()) => {
                        if changed || !wrong.is_empty() {
                            info!(node, healthy = word.healthy, "{}", word.message);
                        }
                        told = Some((word, Instant::now()));
                        wrong.clear();
                    }
                    Err(error) => {
                        let error = format!("{error:#}");
                        if wrong != error {
                            warn!(node, "cannot tell the cluster: {error}");
                            wrong = error;
                        }
                    }
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// A merge patch of the Lease.
fn patch(node: &str, word: &Word) -> Value {
    let message: String = word.message.chars().take(MAX_MESSAGE).collect();
    let mut annotations = json!({
        HEALTHY: word.healthy.to_string(),
        UFS_UNREAD: word.ufs_unread.to_string(),
        MESSAGE: message,
    });
    if let Some(used) = &word.used {
        annotations[USED] = json!(users::told(used));
    }
    json!({
        "metadata": {"annotations": annotations},
        "spec": {"holderIdentity": node, "renewTime": MicroTime(Timestamp::now())},
    })
}

async fn tell(leases: &Api<Lease>, node: &str, word: &Word) -> Result<()> {
    let name = lease_name(node);
    let (plain, patch) = (PatchParams::default(), Patch::Merge(patch(node, word)));
    let patched = leases.patch(&name, &plain, &patch);
    let patched = tokio::time::timeout(RENEW, patched).await;
    patched
        .context("the API server does not answer")?
        .with_context(|| format!("the Lease {name}: see `accel-controller node-access --help`"))?;
    Ok(())
}

/// What a node needs in the cluster to say how it is, and only how it is: an account, its
/// Lease, the right to change that one, and the account's token. As YAML documents.
///
/// # Errors
/// No node can be called so.
pub fn access(namespace: &str, node: &str) -> Result<String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let edge = |part: &str| part.starts_with('-') || part.ends_with('-');
    let fits = |part: &str| !part.is_empty() && part.chars().all(plain) && !edge(part);
    if node.len() > MAX_NODE || !node.split('.').all(fits) {
        bail!(
            "{node:?} is no node's name: lower-case letters, digits, - and ., {MAX_NODE} at most"
        );
    }
    let name = lease_name(node);
    let meta = json!({"name": name, "namespace": namespace});
    let mut lease = meta.clone();
    lease["labels"] = json!({COMPONENT.0: COMPONENT.1});
    let mut token = meta.clone();
    token["annotations"] = json!({"kubernetes.io/service-account.name": name});
    let role = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name});
    let documents = [
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta,
            "automountServiceAccountToken": false}),
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": lease}),
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": meta,
            "rules": [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"],
                "resourceNames": [name], "verbs": ["patch"]}]}),
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": meta, "roleRef": role,
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}]}),
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": token,
            "type": "kubernetes.io/service-account-token"}),
    ];
    yaml::documents(documents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel_oci::Digest;

    #[test]
    fn a_node_may_change_its_own_lease_and_nothing_else() {
        let text = access("image-accel", "n1.example").unwrap();
        let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
        let kinds: Vec<_> = documents.iter().map(|one| one["kind"].as_str()).collect();
        let expected = ["ServiceAccount", "Lease", "Role", "RoleBinding", "Secret"];
        assert_eq!(kinds, expected.map(Some));
        for document in &documents {
            assert_eq!(document["metadata"]["name"], "accel-node-n1.example");
            assert_eq!(document["metadata"]["namespace"], "image-accel");
        }
        let rules = documents
            .iter()
            .flat_map(|document| document["rules"].as_array());
        let rules: Vec<_> = rules.flatten().collect();
        let expected = json!({"apiGroups": ["coordination.k8s.io"], "resources": ["leases"],
            "resourceNames": ["accel-node-n1.example"], "verbs": ["patch"]});
        assert_eq!(rules, [&expected]);
        let long = "n".repeat(MAX_NODE + 1);
        for wrong in ["", "N1", "a_b", "-a", "a..b", "a\n---", &long] {
            access("image-accel", wrong).unwrap_err();
        }
    }

    fn said(healthy: bool, checks: u64) -> Result<Health, UfsError> {
        Ok(Health {
            healthy,
            checks,
            ..Health::default()
        })
    }

    /// What is heard of these, a second apart: `+`, `-`, or ` ` for nothing.
    fn heard(all: impl IntoIterator<Item = Result<Health, UfsError>>) -> String {
        let (mut listener, start) = (Listener::new(), Instant::now());
        let all = all.into_iter().enumerate().map(|(second, read)| {
            let now = start + Duration::from_secs(second as u64);
            match listener.hear(read, now) {
                Some(word) if word.healthy => '+',
                Some(_) => '-',
                None => ' ',
            }
        });
        all.collect()
    }

    #[test]
    fn what_a_file_says_that_was_there_before_does_not_count() {
        let all = [said(true, 7), said(true, 7), said(true, 8), said(false, 9)];
        assert_eq!(heard(all), "  +-");
        // No agent, and one that begins.
        let all = [
            Health::read(Path::new("/no/such/file")),
            said(true, 2),
            said(true, 3),
        ];
        assert_eq!(heard(all), "- +");
    }

    #[test]
    fn an_agent_that_has_been_silent_counts_after_two_checks() {
        let silent = usize::try_from(SILENCE.as_secs()).unwrap();
        let mut all = vec![said(true, 1), said(true, 2)];
        all.extend((0..silent).map(|_| said(true, 2)));
        let mut expected = " ".to_owned() + &"+".repeat(silent + 1);
        assert_eq!(heard(all), expected);
        let mut all = vec![said(true, 1), said(true, 2)];
        all.extend((0..=silent).map(|_| said(true, 2)));
        all.extend([said(true, 3), said(true, 3), said(true, 4)]);
        expected += "---+";
        assert_eq!(heard(all), expected);
        // One that was there and never said anything.
        let all = (0..silent + 2).map(|_| said(true, 2));
        assert_eq!(heard(all), " ".repeat(silent + 1) + "-");
    }

    #[test]
    fn why_a_node_cannot_serve_is_passed_on() {
        let mut listener = Listener::new();
        let now = Instant::now();
        let mut hear = |healthy, ufs_unread, checks| {
            let health = Health {
                healthy,
                ufs_unread,
                checks,
                ..Health::default()
            };
            listener
                .hear(Ok(health), now)
                .is_some_and(|word| word.ufs_unread)
        };
        assert!(!hear(false, true, 1), "who wrote it may be long gone");
        assert!(hear(false, true, 2));
        assert!(!hear(false, false, 3));
        // One failure is nothing.
        assert!(!hear(true, true, 4));
        let silent = listener.hear(
            Ok(Health {
                checks: 4,
                ufs_unread: true,
                ..Health::default()
            }),
            now + SILENCE + Duration::from_secs(1),
        );
        assert!(!silent.unwrap().ufs_unread);
    }

    #[test]
    fn what_containers_run_on_is_told_and_stays_told_while_nobody_knows() {
        let mut listener = Listener::new();
        let now = Instant::now();
        let used = BTreeSet::from([ChainId(Digest::of(b"image"))]);
        let mut hear = |used: Option<&BTreeSet<ChainId>>, checks, after| {
            let health = Health {
                healthy: true,
                checks,
                used_chain_ids: used.cloned(),
                ..Health::default()
            };
            listener.hear(Ok(health), now + after)
        };
        let told = |word: Option<Word>| {
            let patch = patch("n1", &word.unwrap());
            // Null would take it away.
            patch["metadata"]["annotations"].get(USED).cloned()
        };
        assert_eq!(hear(Some(&used), 1, Duration::ZERO), None);
        let text = users::told(&used);
        assert_eq!(
            told(hear(Some(&used), 2, Duration::ZERO)),
            Some(json!(text))
        );
        // Of an older version, or one that does not know it yet: a merge patch changes nothing.
        assert_eq!(told(hear(None, 3, Duration::ZERO)), None);
        assert_eq!(
            told(hear(Some(&BTreeSet::new()), 4, Duration::ZERO)),
            Some(json!(""))
        );
        // The agent has stopped: its containers have not.
        let later = SILENCE + Duration::from_secs(1);
        let silent = hear(Some(&BTreeSet::new()), 4, later);
        assert!(!silent.as_ref().unwrap().healthy);
        assert_eq!(told(silent), None);
    }

    #[test]
    fn an_agent_that_begins_from_nothing_is_heard() {
        let all = [
            said(true, 99),
            said(true, 100),
            said(false, 1),
            said(true, 2),
        ];
        assert_eq!(heard(all), " +-+");
    }
}
