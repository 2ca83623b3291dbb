//! Claims: who needs which images, and so which layers.
//!
//! A **claim** is the file `claims/<holder>.<name>.<16 hex>.json`: a converter writes it
//! before it looks for the first layer, and whoever deletes takes only what no claim and no
//! image record needs any more. `holder` is a cluster, or `by-hand`; `name` what that holder
//! calls it; the last part follows from the content, so that one claim can be made of several
//! images, one after the other, without overwriting anything.
//!
//! Who deletes ([`crate::removal`]) first renames the claim to `….going`: then it protects
//! nothing any more, and another process finds the work that was begun.

use crate::error::UfsError;
use crate::names::{LayerName, RelPath};
use crate::publish::{Outcome, Ufs};
use crate::record::{self, ImageRecord, LayerRecord, RecordError};
use accel_oci::{ChainId, DiffId, Digest};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::str::FromStr;

/// Where claims lie.
pub const CLAIMS: &str = "claims";
/// Holds what was converted without another holder.
pub const BY_HAND: &str = "by-hand";

const LIVE: &str = "json";
const GOING: &str = "going";
const MAX_PART: usize = 100;

/// What a claim is called: `HOLDER/NAME`, each of letters, digits, `-` and `_`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimName {
    /// The cluster, or [`BY_HAND`].
    pub holder: String,
    /// What it calls the claim.
    pub name: String,
}

/// A text that is no name of a claim.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not HOLDER/NAME, each of at most {MAX_PART} letters, digits, - and _")]
pub struct ClaimNameError(String);

/// Whether a text can be part of the name of a claim, or name a cluster.
pub fn is_plain(text: &str) -> bool {
    let plain = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
    (1..=MAX_PART).contains(&text.len()) && text.bytes().all(plain)
}

impl ClaimName {
    /// That of an image that was converted by hand.
    pub fn by_hand(manifest: &Digest) -> Self {
        Self {
            holder: BY_HAND.to_owned(),
            name: manifest.hex(),
        }
    }

    /// The claim that a file is of, and whether it is going.
    fn of_file(file: &str) -> Option<(Self, bool)> {
        let parts: Vec<_> = file.split('.').collect();
        let [holder, name, _, kind] = parts[..] else {
            return None;
        };
        let name = Self {
            holder: holder.to_owned(),
            name: name.to_owned(),
        };
        match kind {
            LIVE => Some((name, false)),
            GOING => Some((name, true)),
            _ => None,
        }
    }
}

impl FromStr for ClaimName {
    type Err = ClaimNameError;

    fn from_str(text: &str) -> Result<Self, ClaimNameError> {
        match text.split_once('/') {
            Some((holder, name)) if is_plain(holder) && is_plain(name) => Ok(Self {
                holder: holder.to_owned(),
                name: name.to_owned(),
            }),
            _ => Err(ClaimNameError(text.to_owned())),
        }
    }
}

impl fmt::Display for ClaimName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.holder, self.name)
    }
}

/// What is claimed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimRecord {
    /// Always [`record::LAYOUT`].
    pub layout: u32,
    /// What was converted, in canonical form, and the digests of indexes that led to it:
    /// under these names it is remembered.
    pub names: Vec<String>,
    /// Where the accelerated image was pushed to.
    #[serde(default)]
    pub targets: Vec<String>,
    /// The images' manifests.
    pub images: Vec<Digest>,
    /// Their layers.
    pub layers: Vec<ClaimedLayer>,
}

impl ClaimRecord {
    /// What is needed of an image that is there.
    pub fn of(image: &ImageRecord) -> Self {
        Self {
            layout: record::LAYOUT,
            names: vec![image.source.clone()],
            targets: Vec::new(),
            images: vec![image.manifest],
            layers: image.layers.iter().map(ClaimedLayer::of).collect(),
        }
    }

    /// Layers alone, without an image.
    pub fn of_layers(layers: &[LayerName]) -> Self {
        Self {
            layout: record::LAYOUT,
            layers: layers.iter().map(ClaimedLayer::alone).collect(),
            ..Self::default()
        }
    }
}

/// A layer that is claimed, under whichever name it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimedLayer {
    /// Digest of the uncompressed tar.
    pub diff_id: DiffId,
    /// Name of the stack up to this layer.
    pub chain_id: ChainId,
    /// Digest of the blob in the registry.
    pub digest: Digest,
}

impl ClaimedLayer {
    fn of(layer: &LayerRecord) -> Self {
        Self {
            diff_id: layer.diff_id,
            chain_id: layer.chain_id,
            digest: layer.digest,
        }
    }

    /// One of which only the name is known. The digest in it stands for all three: as the
    /// lowest of an image a layer has its diffID for its chain ID.
    fn alone(name: &LayerName) -> Self {
        let digest = *name.digest();
        Self {
            diff_id: DiffId(digest),
            chain_id: ChainId(digest),
            digest,
        }
    }

    /// The names that it may lie under.
    pub const fn names(&self) -> [LayerName; 2] {
        [
            LayerName::Chain(self.chain_id),
            LayerName::Layer(self.diff_id),
        ]
    }
}

/// A claim on UFS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundClaim {
    /// Its file's name.
    file: String,
    /// What it is called.
    pub name: ClaimName,
    /// Its holder has begun to give it up.
    pub going: bool,
    /// What is claimed.
    pub record: ClaimRecord,
}

/// A claim that was not there before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewClaim {
    file: RelPath,
}

impl fmt::Display for NewClaim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(f)
    }
}

impl FoundClaim {
    fn path(&self) -> Option<RelPath> {
        format!("{CLAIMS}/{}", self.file).parse().ok()
    }
}

impl Ufs {
    /// Claims images. May be repeated: gives the claim if this is the first time.
    ///
    /// An image that is there and that nobody has claimed is somebody's who converted it
    /// before there were claims: it is claimed for them first.
    pub fn claim(
        &self,
        name: &ClaimName,
        record: &ClaimRecord,
    ) -> Result<Option<NewClaim>, UfsError> {
        let json = record::to_json(record);
        let file = format!(
            "{CLAIMS}/{name}.{}.{LIVE}",
            &blake3::hash(&json).to_hex()[..16],
            name = name.to_string().replace('/', ".")
        );
        let file = self.rel(&file)?;
        if name.holder != BY_HAND {
            self.claim_for_others(record)?;
        }
        // While we are here: nodes may not be allowed to.
        self.make_nodes()?;
        let published = self.publish(&file, &json)? == Outcome::Published;
        Ok(published.then_some(NewClaim { file }))
    }

    /// Takes back a claim of this process, of which nothing has come; no other one under the
    /// same name.
    pub fn unclaim(&self, claim: &NewClaim) -> Result<(), UfsError> {
        let path = self.path(&claim.file);
        self.let_go_of(&path)?;
        crate::removal::unlink(&path.with_extension(GOING))
    }

    fn claim_for_others(&self, record: &ClaimRecord) -> Result<(), UfsError> {
        let there = record.images.iter();
        let there = there.filter_map(|manifest| self.image_record(manifest).transpose());
        let there = there.collect::<Result<Vec<_>, _>>()?;
        // A new image, as most are. The claims of a large cluster are many.
        if there.is_empty() {
            return Ok(());
        }
        let claims = self.claims()?;
        for image in there {
            let claimed = claims
                .iter()
                .any(|claim| claim.record.images.contains(&image.manifest));
            if !claimed {
                let theirs = ClaimRecord::of(&image);
                self.claim(&ClaimName::by_hand(&image.manifest), &theirs)?;
            }
        }
        Ok(())
    }

    /// All claims, as the file system has them now, whatever this machine remembers.
    ///
    /// # Errors
    /// One that cannot be read: what it protects is not known.
    pub fn claims(&self) -> Result<Vec<FoundClaim>, UfsError> {
        let directory = self.rel(CLAIMS)?;
        let mut found = Vec::new();
        for file in self.list_now(&directory)? {
            let Some((name, going)) = ClaimName::of_file(&file) else {
                continue;
            };
            let path = self.rel(&format!("{CLAIMS}/{file}"))?;
            // Given up since.
            let Some(json) = self.read_record(&path)? else {
                continue;
            };
            let record = record::parse(&json, "a claim").map_err(|error| UfsError::Record {
                path: self.path(&path),
                error,
            })?;
            found.push(FoundClaim {
                file,
                name,
                going,
                record,
            });
        }
        found.sort_by(|one, other| one.file.cmp(&other.file));
        Ok(found)
    }

    /// Begins to give a claim up: from now on it protects nothing.
    pub(crate) fn let_go(&self, claim: &FoundClaim) -> Result<(), UfsError> {
        match claim.path().filter(|_| !claim.going) {
            Some(path) => self.let_go_of(&self.path(&path)),
            None => Ok(()),
        }
    }

    fn let_go_of(&self, path: &Path) -> Result<(), UfsError> {
        match fs::rename(path, path.with_extension(GOING)) {
            // Another does the same.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            renamed => renamed.map_err(UfsError::io("rename", path)),
        }
    }

    /// Removes what was let go, when nothing that it named is left to be removed.
    pub(crate) fn forget(&self, claim: &FoundClaim) -> Result<(), UfsError> {
        let Some(path) = claim.path() else {
            return Ok(());
        };
        crate::removal::unlink(&self.path(&path).with_extension(GOING))
    }

    pub(crate) fn rel(&self, text: &str) -> Result<RelPath, UfsError> {
        text.parse().map_err(|_| UfsError::Record {
            path: self.root().join(text),
            error: RecordError::Misplaced {
                wanted: "a path beneath UFS".to_owned(),
                found: text.to_owned(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_from_files() {
        let name: ClaimName = "3f2a-b_c/uid-1".parse().unwrap();
        assert_eq!(name.to_string(), "3f2a-b_c/uid-1");
        assert_eq!(
            ClaimName::of_file("3f2a-b_c.uid-1.0123456789abcdef.json"),
            Some((name.clone(), false))
        );
        assert_eq!(
            ClaimName::of_file("3f2a-b_c.uid-1.0123456789abcdef.going"),
            Some((name, true))
        );
        for file in ["", "a.b.json", "a.b.c.d", "look.host.boot.1.x"] {
            assert_eq!(ClaimName::of_file(file), None, "{file}");
        }
        for text in ["", "a", "a/", "/a", "a/b/c", "a.b/c", "a/ü"] {
            assert!(text.parse::<ClaimName>().is_err(), "{text}");
        }
    }
}
