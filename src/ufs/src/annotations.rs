//! What an accelerated image's manifest says of each of its layers.
//!
//! Annotations of the layer's descriptor, which containerd hands to a snapshotter
//! as labels because of how their names begin:
//!
//! | annotation | value |
//! |---|---|
//! | `containerd.io/snapshot/accel.layout` | number of the format, 1 |
//! | `containerd.io/snapshot/accel.diff-id` | the layer's diffID |
//! | `containerd.io/snapshot/accel.root` | BLAKE3 of its EROFS image, 64 hex digits |
//! | `containerd.io/snapshot/accel.size` | size of its EROFS image in bytes |
//! | `containerd.io/snapshot/accel.image` | digest of the manifest that the image was made from, which names its record on UFS; a hint, may be missing |

use crate::index::{ImageSize, Root};
use accel_oci::DiffId;
use std::collections::BTreeMap;

/// Number of the format.
pub const LAYOUT: &str = "1";
const LAYOUT_KEY: &str = "containerd.io/snapshot/accel.layout";
const DIFF_ID_KEY: &str = "containerd.io/snapshot/accel.diff-id";
const ROOT_KEY: &str = "containerd.io/snapshot/accel.root";
const SIZE_KEY: &str = "containerd.io/snapshot/accel.size";

/// On each layer: what its image's record on UFS is called.
pub const IMAGE_KEY: &str = "containerd.io/snapshot/accel.image";

/// On an accelerated image's manifest: the digest of the manifest it was made from.
pub const ORIGINAL_KEY: &str = "io.image-accel.original";

/// What is said of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerAnnotations {
    /// Its diffID.
    pub diff_id: DiffId,
    /// What vouches for the bytes of its EROFS image.
    pub root: Root,
    /// How many there are.
    pub size: ImageSize,
}

/// Annotations of ours that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the annotation {key} is {}", value.as_ref().map_or_else(|| "missing".to_owned(), |value| format!("{value:?}: {why}")))]
pub struct AnnotationError {
    /// Which one.
    pub key: &'static str,
    /// What it says.
    pub value: Option<String>,
    /// What is wrong with that.
    pub why: String,
}

impl LayerAnnotations {
    /// As annotations.
    pub fn to_map(self) -> BTreeMap<String, String> {
        [
            (LAYOUT_KEY, LAYOUT.to_owned()),
            (DIFF_ID_KEY, self.diff_id.to_string()),
            (ROOT_KEY, self.root.to_string()),
            (SIZE_KEY, self.size.bytes().to_string()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
    }

    /// Reads the annotations, which `get` looks up; none if the layer is not of an
    /// accelerated image.
    pub fn read<'a>(
        get: impl Fn(&str) -> Option<&'a str>,
    ) -> Result<Option<Self>, AnnotationError> {
        let Some(layout) = get(LAYOUT_KEY) else {
            return Ok(None);
        };
        if layout != LAYOUT {
            return Err(AnnotationError {
                key: LAYOUT_KEY,
                value: Some(layout.to_owned()),
                why: "this version reads layout 1 only".to_owned(),
            });
        }
        let size: u64 = field(&get, SIZE_KEY)?;
        let size = ImageSize::new(size).map_err(|error| AnnotationError {
            key: SIZE_KEY,
            value: Some(size.to_string()),
            why: error.to_string(),
        })?;
        Ok(Some(Self {
            diff_id: DiffId(field(&get, DIFF_ID_KEY)?),
            root: field(&get, ROOT_KEY)?,
            size,
        }))
    }
}

fn field<'a, T>(
    get: &impl Fn(&str) -> Option<&'a str>,
    key: &'static str,
) -> Result<T, AnnotationError>
where
    T: std::str::FromStr,
    T::Err: std::fmt::Display,
{
    let value = get(key);
    let error = |why: String| AnnotationError {
        key,
        value: value.map(str::to_owned),
        why,
    };
    let text = value.ok_or_else(|| error(String::new()))?;
    text.parse().map_err(|why: T::Err| error(why.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel_oci::Digest;

    #[test]
    fn annotations_read_back() {
        let layer = LayerAnnotations {
            diff_id: DiffId(Digest::of(b"x")),
            root: Root([7; 32]),
            size: ImageSize::new(8192).unwrap(),
        };
        let mut map = layer.to_map();
        let read = |map: &BTreeMap<String, String>| {
            LayerAnnotations::read(|key| map.get(key).map(String::as_str))
        };
        assert_eq!(read(&map), Ok(Some(layer)));
        assert_eq!(read(&BTreeMap::new()), Ok(None));
        for key in [DIFF_ID_KEY, ROOT_KEY, SIZE_KEY] {
            let before = map.remove(key).unwrap();
            assert_eq!(read(&map).unwrap_err().key, key);
            map.insert(key.to_owned(), "x".to_owned());
            assert_eq!(read(&map).unwrap_err().key, key);
            map.insert(key.to_owned(), before);
        }
        map.insert(LAYOUT_KEY.to_owned(), "2".to_owned());
        assert_eq!(read(&map).unwrap_err().key, LAYOUT_KEY);
    }
}
