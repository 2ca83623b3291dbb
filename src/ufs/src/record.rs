//! The JSON records on UFS: images, names, compressed digests.
//!
//! The shapes are `ARCHITECTURE.md`, "The image record". Every record carries
//! `layout`; an unknown number is refused, unknown fields are ignored. What a
//! record says is checked for consistency on reading: chain IDs follow from
//! diffIDs, paths and sizes from names and sizes.

use crate::index::{ImageSize, Layout, Root};
use crate::names::{LayerName, RelPath, Uuid};
use accel_oci::{ChainId, DiffId, Digest, Platform};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The number that every layout-1 record carries.
pub const LAYOUT: u32 = 1;
/// The largest record that is read, in bytes.
pub const MAX_RECORD: usize = 4 << 20;
/// The most layers an image may have: overlayfs stacks no more.
pub const MAX_LAYERS: usize = 500;

/// A record that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// It is too large to be one.
    #[error("the record has {bytes} bytes, more than the {MAX_RECORD} that any has")]
    TooLarge {
        /// Its size.
        bytes: u64,
    },
    /// It is not the JSON that it should be.
    #[error("this is not {what}: {error}")]
    Json {
        /// What was expected.
        what: &'static str,
        /// What the parser says.
        error: serde_json::Error,
    },
    /// A layout that this program does not know.
    #[error("the record has layout {layout}, this program reads layout {LAYOUT}: use a newer one")]
    Layout {
        /// What it says.
        layout: u64,
    },
    /// Too many layers.
    #[error("the image has {layers} layers; overlayfs stacks at most {MAX_LAYERS}")]
    Layers {
        /// How many.
        layers: usize,
    },
    /// A field of a layer contradicts another.
    #[error("layer {layer} of the record: {field} does not follow from the layer's other fields")]
    Inconsistent {
        /// Which layer, from 0 for the lowest.
        layer: usize,
        /// Which field.
        field: &'static str,
    },
    /// The record lies under another's name.
    #[error("the record is about {found}, not about {wanted}")]
    Misplaced {
        /// What its name says.
        wanted: String,
        /// What it says.
        found: String,
    },
}

/// What the image's config says about the process to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Process {
    /// `NAME=value` each.
    pub env: Vec<String>,
    /// The first words of the command.
    pub entrypoint: Vec<String>,
    /// The words after, replaced by a user's own.
    pub cmd: Vec<String>,
    /// Where it starts.
    pub working_dir: String,
    /// `user[:group]`, names or numbers.
    pub user: String,
}

/// A converted image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Always [`LAYOUT`].
    pub layout: u32,
    /// Digest of the manifest: the image's name.
    pub manifest: Digest,
    /// Digest of the config.
    pub config: Digest,
    /// For which machines it is.
    pub platform: Platform,
    /// Where it was converted from; for people.
    pub source: String,
    /// What to run.
    #[serde(default)]
    pub process: Process,
    /// In the manifest's order, lowest first.
    pub layers: Vec<LayerRecord>,
}

/// A layer of a converted image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Digest of the uncompressed tar.
    pub diff_id: DiffId,
    /// Name of the stack up to this layer.
    pub chain_id: ChainId,
    /// Digest of the blob in the registry.
    pub digest: Digest,
    /// The blob's media type.
    pub media_type: String,
    /// The blob's size in bytes.
    pub size: u64,
    /// What it became.
    pub erofs: ErofsRecord,
}

/// A layer's EROFS image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErofsRecord {
    /// Where it lies on UFS.
    pub path: RelPath,
    /// Its BLAKE3.
    pub root: Root,
    /// Its size in bytes.
    pub size: ImageSize,
    /// The UUID in its superblock.
    pub uuid: Uuid,
    /// Size of its chunk index in bytes.
    pub index_size: u64,
}

impl LayerRecord {
    /// The name under which the image lies, which also names its index. `None`
    /// if [`ErofsRecord::path`] is not one of the two it can be, which
    /// [`ImageRecord::parse`] refuses.
    pub fn name(&self) -> Option<LayerName> {
        [
            LayerName::Chain(self.chain_id),
            LayerName::Layer(self.diff_id),
        ]
        .into_iter()
        .find(|name| name.image() == self.erofs.path)
    }
}

impl ImageRecord {
    /// Reads and checks a record.
    pub fn parse(json: &[u8]) -> Result<Self, RecordError> {
        let record: Self = parse(json, "an image record")?;
        record.check()?;
        Ok(record)
    }

    /// The record's bytes for the file.
    pub fn to_json(&self) -> Vec<u8> {
        to_json(self)
    }

    fn check(&self) -> Result<(), RecordError> {
        if self.layers.len() > MAX_LAYERS {
            return Err(RecordError::Layers {
                layers: self.layers.len(),
            });
        }
        let mut parent = None;
        for (layer, record) in self.layers.iter().enumerate() {
            let wrong = |field| Err(RecordError::Inconsistent { layer, field });
            let chain_id = ChainId::new(parent, record.diff_id);
            if record.chain_id != chain_id {
                return wrong("chain_id");
            }
            parent = Some(chain_id);
            let Some(name) = record.name() else {
                return wrong("erofs.path");
            };
            if record.erofs.uuid != name.uuid() {
                return wrong("erofs.uuid");
            }
            if record.erofs.index_size != Layout::new(record.erofs.size).index_size() {
                return wrong("erofs.index_size");
            }
        }
        Ok(())
    }
}

/// What a source pointed to when it was converted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameRecord {
    /// Always [`LAYOUT`].
    pub layout: u32,
    /// The source in canonical form.
    pub source: String,
    /// The manifest it led to.
    pub manifest: Digest,
}

impl NameRecord {
    /// Reads a record.
    pub fn parse(json: &[u8]) -> Result<Self, RecordError> {
        parse(json, "a name record")
    }

    /// The record's bytes for the file.
    pub fn to_json(&self) -> Vec<u8> {
        to_json(self)
    }
}

/// The diffID of a compressed layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigestRecord {
    /// Always [`LAYOUT`].
    pub layout: u32,
    /// Digest of the blob in the registry.
    pub digest: Digest,
    /// Digest of the tar in it.
    pub diff_id: DiffId,
    /// It hides what lies below it, so as the lowest layer of an image it has
    /// another tree than on top of others: an image of it that is published by its
    /// diffID does not serve as that. Left out if not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub whiteouts: bool,
}

impl DigestRecord {
    /// Reads a record.
    pub fn parse(json: &[u8]) -> Result<Self, RecordError> {
        parse(json, "a digest record")
    }

    /// The record's bytes for the file.
    pub fn to_json(&self) -> Vec<u8> {
        to_json(self)
    }
}

pub(crate) fn parse<T: DeserializeOwned>(
    json: &[u8],
    what: &'static str,
) -> Result<T, RecordError> {
    #[derive(Deserialize)]
    struct Probe {
        layout: u64,
    }
    if json.len() > MAX_RECORD {
        return Err(RecordError::TooLarge {
            bytes: json.len() as u64,
        });
    }
    let wrong = |error| RecordError::Json { what, error };
    // The layout first: the fields of another one may differ.
    let Probe { layout } = serde_json::from_slice(json).map_err(wrong)?;
    if layout != u64::from(LAYOUT) {
        return Err(RecordError::Layout { layout });
    }
    serde_json::from_slice(json).map_err(wrong)
}

pub(crate) fn to_json(record: &impl Serialize) -> Vec<u8> {
    // Fails only for maps with keys that are no strings; there are none here.
    let mut json = serde_json::to_vec_pretty(record).unwrap_or_default();
    json.push(b'\n');
    json
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn record() -> ImageRecord {
        let mut parent = None;
        let layers = [b"a", b"b"].map(|seed| {
            let diff_id = DiffId(Digest::of(seed));
            let chain_id = ChainId::new(parent, diff_id);
            let name = match parent {
                None => LayerName::Layer(diff_id),
                Some(_) => LayerName::Chain(chain_id),
            };
            parent = Some(chain_id);
            LayerRecord {
                diff_id,
                chain_id,
                digest: Digest::of(b"blob"),
                media_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
                size: 123,
                erofs: ErofsRecord {
                    path: name.image(),
                    root: Root([3; 32]),
                    size: ImageSize::new(4096).unwrap(),
                    uuid: name.uuid(),
                    index_size: 8192,
                },
            }
        });
        ImageRecord {
            layout: LAYOUT,
            manifest: Digest::of(b"manifest"),
            config: Digest::of(b"config"),
            platform: Platform {
                os: "linux".into(),
                architecture: "amd64".into(),
                variant: None,
            },
            source: "docker://h/r:latest".into(),
            process: Process {
                cmd: vec!["sh".into()],
                ..Process::default()
            },
            layers: layers.into(),
        }
    }

    fn change(pointer: &str, value: Value) -> Result<ImageRecord, RecordError> {
        let mut json: Value = serde_json::from_slice(&record().to_json()).unwrap();
        *json.pointer_mut(pointer).unwrap() = value;
        ImageRecord::parse(json.to_string().as_bytes())
    }

    #[test]
    fn a_record_reads_back_and_unknown_fields_do_not_matter() {
        let mut json: Value = serde_json::from_slice(&record().to_json()).unwrap();
        json["later"] = json!({"x": 1});
        json["layers"][0]["later"] = json!(1);
        let read = ImageRecord::parse(json.to_string().as_bytes()).unwrap();
        assert_eq!(read, record());
    }

    #[test]
    fn an_unknown_layout_is_refused_by_its_number() {
        let error = ImageRecord::parse(br#"{"layout": 2, "other": []}"#).unwrap_err();
        assert!(error.to_string().contains("layout 2"), "{error}");
    }

    #[test]
    fn contradictions_are_refused_by_their_field() {
        let other = Digest::of(b"other").to_string();
        for (pointer, value, field) in [
            ("/layers/1/diff_id", json!(other), "chain_id"),
            ("/layers/0/chain_id", json!(other), "chain_id"),
            ("/layers/0/erofs/path", json!("tmp/x"), "erofs.path"),
            ("/layers/0/erofs/index_size", json!(4096), "index_size"),
            (
                "/layers/1/erofs/uuid",
                json!(Uuid([0; 16]).to_string()),
                "erofs.uuid",
            ),
            ("/layers/0/erofs/path", json!("../x"), "path beneath UFS"),
            ("/layers/0/erofs/size", json!(1), "size of an image"),
            ("/layers/0/erofs/root", json!("00"), "not a root"),
        ] {
            let error = change(pointer, value).unwrap_err().to_string();
            assert!(error.contains(field), "{pointer}: {error}");
        }
    }

    #[test]
    fn what_is_no_record_is_refused() {
        for json in [&b""[..], b"[]", b"{}", b"{\"layout\": 1}", b"\xff"] {
            let error = ImageRecord::parse(json).unwrap_err().to_string();
            assert!(error.contains("not an image record"), "{error}");
        }
        let large = vec![b' '; MAX_RECORD + 1];
        assert!(matches!(
            ImageRecord::parse(&large),
            Err(RecordError::TooLarge { .. })
        ));
    }
}
