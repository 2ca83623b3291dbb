//! Lazy snapshots: layers that are mounted, not unpacked.

use super::{Result, Snapshotter};
use crate::layers::LayerFailure;
use crate::remote::{self, Fallback, Reason};
use crate::snapshot::{Labels, Layer, Lazy, Trust};
use crate::store::StoreError;
use accel_oci::{ChainId, Digest};
use accel_ufs::annotations::LayerAnnotations;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Keeps a layer while it is on its way into a snapshot.
struct Pin {
    snapshotter: Arc<Snapshotter>,
    layer: Layer,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.snapshotter.store.unpin(self.layer.root);
    }
}

impl Snapshotter {
    /// Tries to make a lazy snapshot of a layer. None: it is not of an accelerated
    /// image, or of another that was not converted.
    pub(super) async fn lazily(
        self: &Arc<Self>,
        labels: &Labels,
        parent: Option<&str>,
    ) -> std::result::Result<Option<Lazy>, Fallback> {
        let named = remote::wanted(labels)?;
        let asked = remote::chain(labels).filter(|_| self.choices.trust_ufs);
        if named.is_none() && asked.is_none() {
            return Ok(None);
        }
        let parent_chain = self
            .store
            .chain_of(parent)
            .map_err(|error| Fallback::new(Reason::Parent, error.to_string()))?;
        let (wanted, lazy) = match (named, asked) {
            (Some(wanted), _) => (wanted, remote::check(labels, parent_chain, &wanted)?),
            (None, Some(chain)) => {
                // One of an accelerated image is as good.
                if let Some(lazy) = self.store.find_chain(parent, chain) {
                    return Ok(Some(lazy));
                }
                let digest = remote::blob(labels);
                let left = self.budget.left(parent_chain, Instant::now())?;
                let Some(found) = self.look_up(chain, parent_chain, digest, left).await? else {
                    return Ok(None);
                };
                let mut lazy = remote::check(labels, parent_chain, &found)?;
                lazy.trust = Trust::Ufs;
                (found, lazy)
            }
            (None, None) => return Ok(None),
        };
        if self.store.find_lazy(parent, lazy).is_none() {
            let left = self.budget.left(parent_chain, Instant::now())?;
            self.layers.note_origin(lazy.root, labels);
            let pin = self.mount(&wanted, lazy, left).await?;
            self.store
                .commit_lazy(parent, labels.clone(), lazy)
                .map_err(|error| Fallback::new(Reason::Store, error.to_string()))?;
            drop(pin);
        }
        Ok(Some(lazy))
    }

    /// Refuses to put a layer of an accelerated image on one that only UFS vouches for:
    /// unpacked or not, it would stand on something that its manifest does not name.
    pub(super) fn keep_apart(&self, labels: &Labels, parent: Option<&str>) -> Result<()> {
        if !matches!(remote::wanted(labels), Ok(None))
            && let Some(below) = self.store.trusting_ufs(parent)
        {
            let why = format!(
                "this image names the roots of its layers, but the layer with the chain ID {below} below was taken on the word of UFS (trust_ufs), for an image that does not: remove the images that have it, then pull again"
            );
            tracing::warn!(chain = %below, "an accelerated image has layers that were taken on the word of UFS");
            return Err(StoreError::State(why).into());
        }
        Ok(())
    }

    /// Notes what was spent on a layer of a pull.
    pub(super) fn spend(&self, labels: &Labels, parent: Option<&str>, started: Instant) {
        if let (Some(chain), Ok(parent)) = (remote::chain(labels), self.store.chain_of(parent)) {
            let now = Instant::now();
            self.budget.spend(parent, chain, now - started, now);
        }
    }

    /// What UFS has for a chain ID, within `left`. None: nothing, which is nothing to
    /// speak of.
    async fn look_up(
        self: &Arc<Self>,
        chain: ChainId,
        below: Option<ChainId>,
        digest: Option<Digest>,
        left: Duration,
    ) -> std::result::Result<Option<LayerAnnotations>, Fallback> {
        let this = Arc::clone(self);
        let looking = move || this.layers.find(chain, below, digest);
        match self.within(left, looking).await? {
            Ok(found) => Ok(Some(found)),
            Err(LayerFailure::Absent) => Ok(None),
            Err(failure) => Err(fallback(&failure)),
        }
    }

    /// Does what waits for the daemon or UFS. It goes on when the time is over.
    async fn within<T: Send + 'static>(
        &self,
        left: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::result::Result<T, Fallback> {
        let working = tokio::task::spawn_blocking(work);
        match tokio::time::timeout(left, working).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => Err(Fallback::new(Reason::Server, error.to_string())),
            Err(_) => {
                self.budget.timed_out(Instant::now());
                let detail = format!("the layer could not be mounted within {left:?}");
                Err(Fallback::new(Reason::Time, detail))
            }
        }
    }

    /// Mounts a layer that is wanted, within `left`.
    async fn mount(
        self: &Arc<Self>,
        wanted: &LayerAnnotations,
        lazy: Lazy,
        left: Duration,
    ) -> std::result::Result<Pin, Fallback> {
        let layer = self.store.pin(wanted, lazy);
        let layer = layer.map_err(|error| Fallback::new(Reason::Store, error.to_string()))?;
        let pin = Pin {
            snapshotter: Arc::clone(self),
            layer,
        };
        // Goes on, with the pin, when the time is over.
        let mounting = move || {
            let mounted = pin.snapshotter.layers.ensure(&pin.layer, false);
            mounted.map(|()| pin)
        };
        let mounted = self.within(left, mounting).await?;
        mounted.map_err(|failure| fallback(&failure))
    }
}

fn fallback(failure: &LayerFailure) -> Fallback {
    let reason = match failure {
        LayerFailure::Absent => Reason::Absent,
        LayerFailure::OtherRoot(_) => Reason::Root,
        LayerFailure::Unreadable(_) => Reason::Ufs,
        LayerFailure::Other(_) => Reason::Server,
    };
    Fallback::new(reason, failure.to_string())
}
