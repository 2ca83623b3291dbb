//! The manifest of an accelerated image: the original's, with annotations; and the index
//! of several.
//!
//! Config and layers are the original's, so the image runs wherever that one does.
//! Only OCI descriptors carry annotations: Docker's media types become OCI's, which
//! name the same bytes.

use crate::ImageError;
use crate::image::Image;
use accel_oci::Digest;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Annotations.
pub type Annotations = BTreeMap<String, String>;

/// An image and what is to be said of it.
#[derive(Debug)]
pub struct Accelerated<'a> {
    /// The original.
    pub image: &'a Image,
    /// Annotations of its manifest.
    pub own: Annotations,
    /// Annotations of each layer, lowest first.
    pub layers: Vec<Annotations>,
}

/// A manifest or index to be written.
#[derive(Debug)]
pub(crate) struct Document {
    pub media_type: &'static str,
    pub digest: Digest,
    pub json: Vec<u8>,
    /// Of a manifest: for which machines the image is.
    pub platform: Option<Value>,
}

impl Document {
    fn new(media_type: &'static str, json: Vec<u8>, platform: Option<Value>) -> Self {
        Self {
            media_type,
            digest: Digest::of(&json),
            json,
            platform,
        }
    }

    /// Its manifest with the annotations.
    pub fn manifest(accelerated: &Accelerated<'_>) -> Result<Self, ImageError> {
        let image = accelerated.image;
        let json = annotate(&image.manifest_json, &accelerated.own, &accelerated.layers);
        let json = json.ok_or_else(|| ImageError::Malformed {
            what: format!("the manifest {}", image.manifest),
            why: "its parts are not where they should be".to_owned(),
        })?;
        Ok(Self::new(MANIFEST, json, Some(platform(image))))
    }

    /// An index of `images` and their manifests, in their order.
    pub fn index<'a>(
        members: impl Iterator<Item = (&'a Self, &'a Image)>,
        own: &Annotations,
    ) -> Self {
        let mut index = json!({
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": members.map(|(manifest, image)| manifest.entry(image)).collect::<Vec<_>>(),
        });
        if !own.is_empty() {
            index["annotations"] = json!(own);
        }
        Self::new(INDEX, index.to_string().into_bytes(), None)
    }

    /// What an index says of it: the original's entry, with another digest.
    fn entry(&self, image: &Image) -> Value {
        let entry = image
            .entry
            .as_ref()
            .and_then(|entry| serde_json::to_value(entry).ok());
        let mut entry = entry.unwrap_or_else(|| json!({}));
        if let Some(fields) = entry.as_object_mut() {
            fields.remove("data");
            fields.remove("urls");
        }
        for (name, value) in self.descriptor() {
            if name != "platform" || entry[&name].is_null() {
                entry[name] = value;
            }
        }
        entry
    }

    /// Its descriptor's fields.
    pub fn descriptor(&self) -> Map<String, Value> {
        let mut fields = Map::new();
        fields.insert("mediaType".to_owned(), self.media_type.into());
        fields.insert("digest".to_owned(), self.digest.to_string().into());
        fields.insert("size".to_owned(), self.json.len().into());
        if let Some(platform) = &self.platform {
            fields.insert("platform".to_owned(), platform.clone());
        }
        fields
    }
}

fn platform(image: &Image) -> Value {
    let platform = &image.platform;
    let mut json = json!({"os": platform.os, "architecture": platform.architecture});
    if let Some(variant) = &platform.variant {
        json["variant"] = variant.as_str().into();
    }
    json
}

impl Image {
    /// The annotations of the layers in the manifest, lowest first.
    pub fn layer_annotations(&self) -> Vec<BTreeMap<String, String>> {
        let manifest: Value = serde_json::from_slice(&self.manifest_json).unwrap_or_default();
        let layers = manifest["layers"].as_array().into_iter().flatten();
        let read = |layer: &Value| {
            let annotations = layer["annotations"].as_object().into_iter().flatten();
            let texts = annotations.filter_map(|(key, value)| {
                let text = value.as_str()?;
                Some((key.clone(), text.to_owned()))
            });
            texts.collect()
        };
        layers.map(read).collect()
    }
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
