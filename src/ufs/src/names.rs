//! The path of everything on UFS, relative to its root.
//!
//! The table is `ARCHITECTURE.md`, "Names on UFS". Paths are made from digests,
//! never from what a registry or a user says, so none can lead out of UFS.

use crate::hex;
use crate::node::NODES;
use accel_oci::{ChainId, DiffId, Digest};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where unfinished files live; nothing refers to them.
pub const TMP: &str = "tmp";
/// Where processes say that they are at work.
pub const LEASES: &str = "leases";
/// Where files go that were damaged and replaced; nothing refers to them.
pub const QUARANTINE: &str = "quarantine";
/// Where image records live.
pub const IMAGES: &str = "images";
/// Where sources are remembered.
pub const NAMES: &str = "names";
/// Layers by diffID.
pub const LAYERS: &str = "layers";
/// Layers by chain ID.
pub const CHAINS: &str = "chains";

/// A path relative to the root of UFS: one or more components of `A-Z a-z 0-9
/// . _ -`, none of them beginning with a dot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RelPath(String);

/// A text that is no path beneath UFS.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a path beneath UFS")]
pub struct RelPathError {
    /// What was given.
    pub text: String,
}

impl RelPath {
    /// The path as text, with `/` between components.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path beneath `root`.
    pub fn beneath(&self, root: &Path) -> PathBuf {
        root.join(&self.0)
    }
}

impl FromStr for RelPath {
    type Err = RelPathError;

    fn from_str(text: &str) -> Result<Self, RelPathError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let component =
            |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(plain);
        if text.len() <= 1024 && text.split('/').all(component) {
            return Ok(Self(text.to_owned()));
        }
        Err(RelPathError {
            text: text.to_owned(),
        })
    }
}

impl TryFrom<String> for RelPath {
    type Error = RelPathError;

    fn try_from(text: String) -> Result<Self, RelPathError> {
        text.parse()
    }
}

impl From<RelPath> for String {
    fn from(path: RelPath) -> Self {
        path.0
    }
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn sharded(room: &str, digest: &Digest, extension: &str) -> RelPath {
    let hex = digest.hex();
    RelPath(format!("{room}/sha256/{}/{hex}.{extension}", &hex[..2]))
}

/// What a converted layer is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerName {
    /// A layer whose tree is its own, by diffID.
    Layer(DiffId),
    /// A layer whose tree depends on those below it, by chain ID.
    Chain(ChainId),
    /// No layer of an image: what a node reads to see whether it can
    /// ([`crate::canary`]).
    Canary(Digest),
}

impl LayerName {
    /// The digest in the name.
    pub const fn digest(&self) -> &Digest {
        match self {
            Self::Layer(diff_id) => &diff_id.0,
            Self::Chain(chain_id) => &chain_id.0,
            Self::Canary(digest) => digest,
        }
    }

    /// Where its EROFS image lies.
    pub fn image(&self) -> RelPath {
        self.file("erofs", "canary")
    }

    /// Where its chunk index lies. The layer is there if and only if this is.
    pub fn index(&self) -> RelPath {
        self.file("idx", "canary-idx")
    }

    fn file(&self, of_layer: &str, of_canary: &str) -> RelPath {
        match self {
            Self::Layer(diff_id) => sharded(LAYERS, &diff_id.0, of_layer),
            Self::Chain(chain_id) => sharded(CHAINS, &chain_id.0, of_layer),
            // Where nodes can write.
            Self::Canary(digest) => RelPath(format!("{NODES}/{}.{of_canary}", digest.hex())),
        }
    }

    /// The UUID in the image's superblock, by which a mount can be told.
    pub fn uuid(&self) -> Uuid {
        Uuid::of(self.digest())
    }

    /// The layer whose index is at `path`.
    pub(crate) fn of_index(path: &RelPath) -> Option<Self> {
        let (_, file) = path.as_str().rsplit_once('/')?;
        let digest: Digest = format!("sha256:{}", file.strip_suffix(".idx")?)
            .parse()
            .ok()?;
        let names = [Self::Layer(DiffId(digest)), Self::Chain(ChainId(digest))];
        names.into_iter().find(|name| name.index() == *path)
    }
}

impl fmt::Display for LayerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layer(diff_id) => write!(f, "layer {diff_id}"),
            Self::Chain(chain_id) => write!(f, "chain {chain_id}"),
            Self::Canary(digest) => write!(f, "canary {digest}"),
        }
    }
}

/// The UUID of an EROFS image.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// The UUID of the image of the layer with this diffID, or of the chain with
    /// this chain ID.
    pub fn of(digest: &Digest) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"image-accel layout 1 uuid");
        hasher.update(digest.as_bytes());
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        bytes[6] = bytes[6] & 0x0f | 0x80;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Self(bytes)
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = hex::encode(&self.0);
        let (a, b, c) = (&hex[..8], &hex[8..12], &hex[12..16]);
        write!(f, "{a}-{b}-{c}-{}-{}", &hex[16..20], &hex[20..])
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for Uuid {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        hex::decode(&text.replace('-', ""))
            .map(Self)
            .filter(|uuid| uuid.to_string() == text)
            .ok_or_else(|| format!("{text:?} is not a UUID in lower case"))
    }
}

impl From<Uuid> for String {
    fn from(uuid: Uuid) -> Self {
        uuid.to_string()
    }
}

/// Where the diffID of the compressed layer `digest` is noted.
pub fn by_digest(digest: &Digest) -> RelPath {
    sharded("by-digest", digest, "json")
}

/// Where the record of the image with this manifest digest lies.
pub fn image_record(manifest: &Digest) -> RelPath {
    RelPath(format!("{IMAGES}/sha256/{}.json", manifest.hex()))
}

/// What mounting the image with this manifest digest reads first.
pub fn image_start(manifest: &Digest) -> RelPath {
    RelPath(format!("{IMAGES}/sha256/{}.start", manifest.hex()))
}

/// The directory of what `source` pointed to: a canonical source (see
/// [`crate::resolve::canonical`]), or the digest of an index.
pub fn name_directory(source: &dyn fmt::Display) -> RelPath {
    let digest = Digest::of(source.to_string().as_bytes());
    RelPath(format!("{NAMES}/{}", digest.hex()))
}

/// Nanoseconds since 1970, as they name a name record: later ones sort later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nanoseconds(pub u64);

impl Nanoseconds {
    /// The time in a name record's file name.
    pub fn from_file_name(name: &str) -> Option<Self> {
        let digits = name.strip_suffix(".json")?;
        (digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit()))
            .then(|| digits.parse().ok().map(Self))?
    }
}

/// Where a name record of `source`, as for [`name_directory`], made at `time`, lies.
pub fn name_record(source: &dyn fmt::Display, time: Nanoseconds) -> RelPath {
    RelPath(format!("{}/{:020}.json", name_directory(source), time.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel_oci::ImageSource;

    #[test]
    fn names_are_those_of_the_table() {
        let digest = Digest::of(b"");
        let hex = digest.hex();
        let layer = LayerName::Layer(DiffId(digest));
        let chain = LayerName::Chain(ChainId(digest));
        let canary = LayerName::Canary(digest);
        let source: ImageSource = "docker://h/r".parse().unwrap();
        let name = Digest::of(b"docker://h/r:latest").hex();
        for (path, want) in [
            (layer.image(), format!("layers/sha256/e3/{hex}.erofs")),
            (layer.index(), format!("layers/sha256/e3/{hex}.idx")),
            (chain.image(), format!("chains/sha256/e3/{hex}.erofs")),
            (canary.image(), format!("nodes/{hex}.canary")),
            (canary.index(), format!("nodes/{hex}.canary-idx")),
            (
                by_digest(&digest),
                format!("by-digest/sha256/e3/{hex}.json"),
            ),
            (image_record(&digest), format!("images/sha256/{hex}.json")),
            (
                name_record(&source, Nanoseconds(42)),
                format!("names/{name}/00000000000000000042.json"),
            ),
        ] {
            assert_eq!(path.as_str(), want);
            assert_eq!(want.parse(), Ok(path));
        }
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for text in [
            "", "/", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\0", "a b",
        ] {
            assert!(text.parse::<RelPath>().is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn a_uuid_has_version_and_variant_and_reads_back() {
        let uuid = Uuid::of(&Digest::of(b"x"));
        let text = uuid.to_string();
        assert_eq!(&text[14..15], "8");
        assert!("89ab".contains(&text[19..20]));
        assert_eq!(Uuid::try_from(text.clone()), Ok(uuid));
        assert!(Uuid::try_from(text.replace('-', "")).is_err());
    }

    #[test]
    fn times_in_file_names_read_back_and_sort() {
        let time = |n| Nanoseconds(n);
        let source: ImageSource = "docker://h/r".parse().unwrap();
        let file = |n| {
            let path = name_record(&source, time(n));
            path.as_str().rsplit('/').next().unwrap().to_owned()
        };
        assert_eq!(Nanoseconds::from_file_name(&file(7)), Some(time(7)));
        assert_eq!(
            Nanoseconds::from_file_name(&file(u64::MAX)),
            Some(time(u64::MAX))
        );
        assert!(file(9) < file(10));
        assert_eq!(Nanoseconds::from_file_name("7.json"), None);
    }
}
