//! Whether a layer may be loaded lazily, and how long that may take.
//!
//! containerd downloads and checks nothing of a layer that is loaded lazily, so
//! what a manifest says is checked here: the diffID beside the root must, on top of
//! the parent, give the chain ID that containerd wants. Otherwise a hostile
//! manifest could put one image's layer under another's chain ID, where every later
//! container would find it.
//!
//! Of other images nobody vouches for roots but UFS, which a chain ID is looked up on
//! if the operator says so ([`chain`], [`blob`]). Such a snapshot is not used for an
//! accelerated image, and nothing of one is put on top of it.
//!
//! A pull has one [`Budget`] of time for all of its layers. containerd does not
//! say which pull a request belongs to, but it prepares layer after layer, each on
//! top of the one before: what was spent until a parent was there, just now, counts
//! against its child, whether they are lazy or unpacked. After a time-out nothing is
//! tried for a while.

use crate::snapshot::{Labels, Lazy, SNAPSHOT_REF, Trust};
use accel_oci::{ChainId, Digest, ImageSource, Version};
use accel_ufs::annotations::{IMAGE_KEY, LayerAnnotations};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Kinds of reasons for which a layer of an accelerated image is unpacked after all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// An annotation of ours cannot be read.
    Annotations,
    /// The chain ID of the parent is not known.
    Parent,
    /// The annotated diffID does not give the wanted chain ID.
    Chain,
    /// The layer is not on UFS.
    Absent,
    /// UFS has it with another root.
    Root,
    /// UFS does not answer, or has a damaged index.
    Ufs,
    /// The daemon does not answer, or a mount fails.
    Server,
    /// The pull has no time left.
    Time,
    /// A time-out was not long ago.
    Breaker,
    /// The database cannot be written.
    Store,
}

impl Reason {
    /// As `status` shows it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Annotations => "annotations",
            Self::Parent => "parent",
            Self::Chain => "chain",
            Self::Absent => "absent",
            Self::Root => "root",
            Self::Ufs => "ufs",
            Self::Server => "server",
            Self::Time => "time",
            Self::Breaker => "breaker",
            Self::Store => "store",
        }
    }
}

/// Why a layer is unpacked after all.
#[derive(Debug)]
pub struct Fallback {
    /// Of which kind.
    pub reason: Reason,
    /// For people.
    pub detail: String,
}

/// CRI's label with the digest of the image's manifest.
const MANIFEST_DIGEST: &str = "containerd.io/snapshot/cri.manifest-digest";

/// The image that a layer is of, as `mkfs-accel convert` takes it, if CRI has said so
/// in the snapshot's labels. By its manifest's digest where that is known: a tag may
/// move.
pub fn origin(labels: &Labels) -> Option<String> {
    let image = labels.get("containerd.io/snapshot/cri.image-ref")?;
    let mut source: ImageSource = format!("docker://{image}").parse().ok()?;
    let digest = labels.get(MANIFEST_DIGEST);
    if let (ImageSource::Registry(reference), Some(digest)) =
        (&mut source, digest.and_then(|digest| digest.parse().ok()))
    {
        reference.version = Version::Digest(digest);
    }
    Some(source.to_string())
}

/// What the record on UFS is called that has the layer, as the manifest says, or for an
/// image that is not an accelerated one, CRI.
pub fn image(labels: &Labels) -> Option<Digest> {
    let said = labels.get(IMAGE_KEY);
    let said = said.or_else(|| match wanted(labels) {
        Ok(None) => labels.get(MANIFEST_DIGEST),
        _ => None,
    });
    said?.parse().ok()
}

impl Fallback {
    /// With a text.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
        }
    }
}

/// What an accelerated image says of a layer; none for other images and for
/// snapshots that are no layers.
pub fn wanted(labels: &Labels) -> Result<Option<LayerAnnotations>, Fallback> {
    if !labels.contains_key(SNAPSHOT_REF) {
        return Ok(None);
    }
    LayerAnnotations::read(|key| labels.get(key).map(String::as_str))
        .map_err(|error| Fallback::new(Reason::Annotations, error.to_string()))
}

/// The chain ID that a layer's labels name.
pub fn chain(labels: &Labels) -> Option<ChainId> {
    let digest = labels.get(SNAPSHOT_REF)?.parse().ok()?;
    Some(ChainId(digest))
}

/// The digest of a layer's blob in the registry, if the CRI or the transfer service has
/// said so.
pub fn blob(labels: &Labels) -> Option<Digest> {
    let digest = labels.get("containerd.io/snapshot/cri.layer-digest")?;
    digest.parse().ok()
}

/// Checks that the layer, on top of `parent`, is what containerd asks for.
pub fn check(
    labels: &Labels,
    parent: Option<ChainId>,
    wanted: &LayerAnnotations,
) -> Result<Lazy, Fallback> {
    let asked = labels.get(SNAPSHOT_REF).map_or("", String::as_str);
    let chain_id = ChainId::new(parent, wanted.diff_id);
    if chain_id.to_string() != asked {
        return Err(Fallback::new(
            Reason::Chain,
            format!(
                "containerd wants the chain {asked}, but the annotated diffID {} makes it {chain_id}: the manifest is wrong or hostile",
                wanted.diff_id
            ),
        ));
    }
    Ok(Lazy {
        chain_id,
        root: wanted.root,
        trust: Trust::Manifest,
    })
}

/// Between a layer and the next of the same pull there is no more time than this.
const SAME_PULL: Duration = Duration::from_secs(30);
/// No layer takes longer to unpack than this.
const UNPACKING: Duration = Duration::from_secs(3600);
/// How long nothing is tried after a time-out.
const PAUSE: Duration = Duration::from_secs(10);

/// The time that a pull may spend on lazy layers.
#[derive(Debug)]
pub struct Budget {
    limit: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Per chain: what the pull had spent when it was made, and when that was.
    /// For those that are being unpacked it is not over yet.
    spent: HashMap<ChainId, (Duration, Instant)>,
    pause: Option<Instant>,
}

impl Budget {
    /// `limit` per pull.
    pub fn new(limit: Duration) -> Self {
        Self {
            limit,
            state: Mutex::default(),
        }
    }

    /// The limit.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// What is left for the next layer on `parent`.
    pub fn left(&self, parent: Option<ChainId>, now: Instant) -> Result<Duration, Fallback> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.pause.is_some_and(|end| now < end) {
            let detail = "a layer took too long a moment ago, and nothing is tried for a while";
            return Err(Fallback::new(Reason::Breaker, detail));
        }
        state.pause = None;
        let left = self.limit.saturating_sub(state.spent(parent, now));
        if left.is_zero() {
            let detail = format!("this pull has spent its {:?}", self.limit);
            return Err(Fallback::new(Reason::Time, detail));
        }
        Ok(left)
    }

    /// Notes what was spent on a layer, whatever came of it.
    pub fn spend(&self, parent: Option<ChainId>, chain: ChainId, took: Duration, now: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let total = state.spent(parent, now) + took;
        state
            .spent
            .retain(|_, (_, at)| now.saturating_duration_since(*at) < UNPACKING);
        state.spent.insert(chain, (total, now));
    }

    /// Notes that a layer was unpacked: the next one of its pull comes now.
    pub fn unpacked(&self, chain: ChainId, now: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, at)) = state.spent.get_mut(&chain) {
            *at = now;
        }
    }

    /// Notes that a layer took too long.
    pub fn timed_out(&self, now: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.pause = Some(now + PAUSE);
    }
}

impl State {
    fn spent(&self, parent: Option<ChainId>, now: Instant) -> Duration {
        let entry = parent.and_then(|parent| self.spent.get(&parent));
        entry
            .filter(|(_, at)| now.saturating_duration_since(*at) < SAME_PULL)
            .map_or(Duration::ZERO, |(spent, _)| *spent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel_oci::{DiffId, Digest};
    use accel_ufs::index::{ImageSize, Root};

    fn diff(name: &str) -> DiffId {
        DiffId(Digest::of(name.as_bytes()))
    }

    fn annotations(name: &str) -> LayerAnnotations {
        LayerAnnotations {
            diff_id: diff(name),
            root: Root([3; 32]),
            size: ImageSize::new(4096).unwrap(),
        }
    }

    #[test]
    fn the_image_is_told_by_digest_if_it_is_known() {
        let mut labels = Labels::new();
        assert_eq!(origin(&labels), None);
        let key = |name: &str| format!("containerd.io/snapshot/cri.{name}");
        labels.insert(key("image-ref"), "h.example:5000/a/b:v1".to_owned());
        let told = origin(&labels);
        assert_eq!(told.as_deref(), Some("docker://h.example:5000/a/b:v1"));
        let digest = Digest::of(b"manifest").to_string();
        labels.insert(key("manifest-digest"), digest.clone());
        let told = origin(&labels);
        assert_eq!(told, Some(format!("docker://h.example:5000/a/b@{digest}")));
        labels.insert(key("image-ref"), "no image".to_owned());
        assert_eq!(origin(&labels), None);
    }

    #[test]
    fn the_record_is_named_by_the_manifest_or_else_by_the_cri() {
        let digest = |text: &str| Digest::of(text.as_bytes());
        let mut labels = annotations("top").to_map();
        labels.insert(SNAPSHOT_REF.to_owned(), digest("chain").to_string());
        labels.insert(MANIFEST_DIGEST.to_owned(), digest("pulled").to_string());
        // The accelerated manifest itself has no record.
        assert_eq!(image(&labels), None);
        labels.insert(IMAGE_KEY.to_owned(), digest("original").to_string());
        assert_eq!(image(&labels), Some(digest("original")));
        labels.insert(IMAGE_KEY.to_owned(), "no digest".to_owned());
        assert_eq!(image(&labels), None);
        labels.retain(|key, _| key == MANIFEST_DIGEST);
        assert_eq!(image(&labels), Some(digest("pulled")));
    }

    #[test]
    fn only_the_chain_that_containerd_wants_is_taken() {
        let base = ChainId::new(None, diff("base"));
        let top = ChainId::new(Some(base), diff("top"));
        let mut labels = annotations("top").to_map();
        labels.insert(SNAPSHOT_REF.to_owned(), top.to_string());
        let read = wanted(&labels).unwrap().unwrap();
        assert_eq!(check(&labels, Some(base), &read).unwrap().chain_id, top);
        // Another parent, no parent, another layer's annotations.
        for (parent, layer) in [(Some(top), "top"), (None, "top"), (Some(base), "base")] {
            let error = check(&labels, parent, &annotations(layer)).unwrap_err();
            assert_eq!(error.reason, Reason::Chain);
        }
        labels.remove(SNAPSHOT_REF);
        assert!(wanted(&labels).unwrap().is_none());
    }

    #[test]
    fn a_pull_has_one_budget() {
        let budget = Budget::new(Duration::from_secs(5));
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut parent = None;
        for number in 0..5u32 {
            let now = start + second * number;
            assert_eq!(budget.left(parent, now).unwrap(), second * (5 - number));
            let chain = ChainId::new(parent, diff(&number.to_string()));
            budget.spend(parent, chain, second, now);
            parent = Some(chain);
        }
        let now = start + second * 5;
        assert_eq!(budget.left(parent, now).unwrap_err().reason, Reason::Time);
        // What is unpacked slowly is part of the same pull.
        let (unpacked, later) = (ChainId::new(parent, diff("unpacked")), now + SAME_PULL * 9);
        budget.spend(parent, unpacked, Duration::ZERO, now);
        assert!(budget.left(Some(unpacked), later).is_ok());
        budget.unpacked(unpacked, later);
        let next = budget.left(Some(unpacked), later + second);
        assert_eq!(next.unwrap_err().reason, Reason::Time);
        // Another image, and another pull on the same base later.
        assert_eq!(budget.left(None, now).unwrap(), second * 5);
        assert_eq!(budget.left(parent, now + SAME_PULL).unwrap(), second * 5);
    }

    #[test]
    fn after_a_time_out_nothing_is_tried_for_a_while() {
        let budget = Budget::new(Duration::from_secs(5));
        let now = Instant::now();
        budget.timed_out(now);
        assert_eq!(budget.left(None, now).unwrap_err().reason, Reason::Breaker);
        assert!(budget.left(None, now + PAUSE).is_ok());
    }
}
