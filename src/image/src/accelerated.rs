//! The manifest of an accelerated image: the original's, with annotations.
//!
//! Config and layers are the original's, so the image runs wherever that one does.
//! Only OCI descriptors carry annotations: Docker's media types become OCI's, which
//! name the same bytes.

use crate::ImageError;
use crate::image::Image;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Annotations.
pub(crate) type Annotations = BTreeMap<String, String>;

/// The manifest of `image` with annotations on itself and on each of its layers,
/// lowest first.
pub(crate) fn manifest(
    image: &Image,
    own: &Annotations,
    layers: &[Annotations],
) -> Result<Vec<u8>, ImageError> {
    annotate(&image.manifest_json, own, layers).ok_or_else(|| ImageError::Malformed {
        what: format!("the manifest {}", image.manifest),
        why: "its parts are not where they should be".to_owned(),
    })
}

fn annotate(json: &[u8], own: &Annotations, layers: &[Annotations]) -> Option<Vec<u8>> {
    let mut manifest: Value = serde_json::from_slice(json).ok()?;
    let fields = manifest.as_object_mut()?;
    fields.insert("mediaType".to_owned(), MANIFEST.into());
    add(fields, own)?;
    to_oci(fields.get_mut("config")?)?;
    let descriptors = fields.get_mut("layers")?.as_array_mut()?;
    if descriptors.len() != layers.len() {
        return None;
    }
    for (descriptor, annotations) in descriptors.iter_mut().zip(layers) {
        to_oci(descriptor)?;
        add(descriptor.as_object_mut()?, annotations)?;
    }
    serde_json::to_vec(&manifest).ok()
}

fn add(fields: &mut Map<String, Value>, annotations: &Annotations) -> Option<()> {
    let there = fields
        .entry("annotations")
        .or_insert_with(|| Value::Object(Map::new()));
    if there.is_null() {
        *there = Value::Object(Map::new());
    }
    let there = there.as_object_mut()?;
    for (key, value) in annotations {
        there.insert(key.clone(), value.as_str().into());
    }
    Some(())
}

fn to_oci(descriptor: &mut Value) -> Option<()> {
    let media_type = descriptor.get_mut("mediaType")?;
    let oci = match media_type.as_str()? {
        "application/vnd.docker.container.image.v1+json" => {
            "application/vnd.oci.image.config.v1+json"
        }
        "application/vnd.docker.image.rootfs.diff.tar" => "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
            "application/vnd.oci.image.layer.v1.tar+gzip"
        }
        "application/vnd.docker.image.rootfs.diff.tar.zstd" => {
            "application/vnd.oci.image.layer.v1.tar+zstd"
        }
        _ => return Some(()),
    };
    *media_type = oci.into();
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_manifest_becomes_an_oci_one_with_annotations() {
        let docker = r#"{"schemaVersion":2,
            "mediaType":"application/vnd.docker.distribution.manifest.v2+json",
            "config":{"mediaType":"application/vnd.docker.container.image.v1+json","digest":"sha256:c","size":1},
            "layers":[
                {"mediaType":"application/vnd.docker.image.rootfs.diff.tar.gzip","digest":"sha256:a","size":2},
                {"mediaType":"application/vnd.oci.image.layer.v1.tar+zstd","digest":"sha256:b","size":3,
                 "annotations":{"kept":"yes"}}]}"#;
        let one = |key: &str| Annotations::from([(key.to_owned(), "x".to_owned())]);
        let made = annotate(
            docker.as_bytes(),
            &one("own"),
            &[one("first"), one("second")],
        );
        let made: Value = serde_json::from_slice(&made.unwrap()).unwrap();
        let expected: Value = serde_json::from_str(
            r#"{"schemaVersion":2,
            "mediaType":"application/vnd.oci.image.manifest.v1+json",
            "annotations":{"own":"x"},
            "config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:c","size":1},
            "layers":[
                {"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:a","size":2,
                 "annotations":{"first":"x"}},
                {"mediaType":"application/vnd.oci.image.layer.v1.tar+zstd","digest":"sha256:b","size":3,
                 "annotations":{"kept":"yes","second":"x"}}]}"#,
        )
        .unwrap();
        assert_eq!(made, expected);
        assert!(annotate(docker.as_bytes(), &one("own"), &[one("first")]).is_none());
    }
}
