//! The cluster's nodes: which there are, and that those have the label that can serve.

use super::{Context, RunError, in_words};
use crate::job;
use crate::labels::{self, Looked, Seen};
use crate::obstacles::Part;
use crate::resource::{ImageAcceleration, SERVICE_NAME};
use crate::users::Users;
use futures_util::StreamExt as _;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ListParams, Patch, PatchParams};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::timeout;
use tracing::{info, warn};

/// How often to look how the nodes are: they have lost their label within half a minute.
const PAUSE: Duration = Duration::from_secs(3);
/// How long such a look may take.
const LOOK: Duration = Duration::from_secs(15);
/// How often to look which nodes there are.
const LIST: Duration = Duration::from_secs(10);
/// Nodes that are changed at a time.
const AT_ONCE: usize = 8;

/// The cluster's nodes, as they were listed.
pub(super) struct Known {
    listed: Instant,
    nodes: Arc<Vec<ObjectMeta>>,
}

impl Context {
    /// The names of the cluster's nodes.
    pub(super) async fn nodes(&self) -> Result<Vec<String>, RunError> {
        let known = self.known_nodes(LIST).await?;
        let names = known.iter().filter_map(|node| node.name.clone());
        Ok(names.collect())
    }

    pub(super) fn looked(&self) -> MutexGuard<'_, Option<Looked>> {
        self.looked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> MutexGuard<'_, Option<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cluster's nodes, as they were not longer ago than that.
    async fn known_nodes(&self, age: Duration) -> Result<Arc<Vec<ObjectMeta>>, RunError> {
        if let Some(known) = &*self.known()
            && known.listed.elapsed() < age
        {
            return Ok(Arc::clone(&known.nodes));
        }
        let all = self.all::<Node>();
        let listed = Instant::now();
        let nodes = all.list_metadata(&ListParams::default()).await?.items;
        let mut nodes: Vec<_> = nodes.into_iter().map(|node| node.metadata).collect();
        for node in &mut nodes {
            // That is the most of it.
            node.managed_fields = None;
        }
        let nodes = Arc::new(nodes);
        *self.known() = Some(Known {
            listed,
            nodes: Arc::clone(&nodes),
        });
        Ok(nodes)
    }

    /// Sees to it that nodes have the label exactly while they can serve; does not end.
    pub(super) async fn label_nodes(&self) {
        let mut seen = Seen::default();
        loop {
            let look = timeout(LOOK, self.look_at_nodes(&mut seen));
            // What does not answer is like what refuses.
            let looked = look.await.unwrap_or_else(|late| Err(late.into()));
            match looked {
                Ok(()) => self.obstacles().passed(Part::Nodes),
                Err(error) => {
                    self.metrics.error();
                    warn!("the nodes cannot be looked at: {error}");
                    let why = error.in_words();
                    self.meet(Part::Nodes, format!("the nodes cannot be looked at: {why}"));
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn look_at_nodes(&self, seen: &mut Seen) -> Result<(), RunError> {
        let of_nodes = ListParams::default().labels(&job::selector(labels::COMPONENT));
        let service = self
            .all::<ImageAcceleration>()
            .get_opt(SERVICE_NAME)
            .await?;
        let service = service.filter(|service| service.metadata.deletion_timestamp.is_none());
        let mut known = self.known_nodes(LIST).await?;
        // Listed, not watched: nodes must not look silent because a watch is.
        let leases = self.own::<Lease>().list(&of_nodes).await?;
        let names = known.iter().filter_map(|node| node.name.as_deref());
        *self.users() = Some(Arc::new(Users::of(&leases.items, names)));
        let words = seen.look(&leases.items, Instant::now());
        let spec = service.as_ref().map(|service| &service.spec);
        let mut labels = labels::labels(&known, &words, spec);
        if !labels.changes.is_empty() {
            // What is changed is looked at once more: somebody else may have changed it.
            known = self.known_nodes(Duration::ZERO).await?;
            labels = labels::labels(&known, &words, spec);
        }
        let all = &self.all::<Node>();
        let mut changed = futures_util::stream::iter(&labels.changes)
            .map(|change| async move {
                let merge = Patch::Merge(&change.patch);
                let (name, plain) = (&change.node, PatchParams::default());
                (change, all.patch_metadata(name, &plain, &merge).await)
            })
            .buffered(AT_ONCE);
        let (mut ready, mut refused) = (labels.ready, None);
        while let Some((change, patched)) = changed.next().await {
            let node = &change.node;
            let said = words.get(node).map_or("", |word| &word.message);
            match patched {
                Ok(_) => info!(node, labelled = change.gives, "{said}"),
                Err(error) => {
                    ready -= u32::from(change.gives);
                    match error {
                        // It is another one by now, or none: looked at anew.
                        kube::Error::Api(status) if matches!(status.code, 404 | 409) => {}
                        error => {
                            self.metrics.error();
                            let why = in_words(&error);
                            warn!(node, "cannot be labelled: {why}");
                            refused.get_or_insert(format!("{node}: {why}"));
                        }
                    }
                }
            }
        }
        drop(changed);
        if !labels.changes.is_empty() {
            // They are others now.
            *self.known() = None;
        }
        self.metrics.nodes(ready, labels.nodes);
        let now = Some(Looked {
            nodes: labels.nodes,
            ready,
            ufs: labels.ufs,
            refused,
        });
        let mut looked = self.looked();
        if *looked != now {
            *looked = now;
            self.counted.notify_one();
        }
        Ok(())
    }
}
