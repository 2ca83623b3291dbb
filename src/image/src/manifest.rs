//! Manifests and indexes: what they are, and which entry of an index is meant.

use crate::ImageError;
use accel_oci::{Digest, Platform};
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use serde::Deserialize;
use std::collections::BTreeMap;

/// What is accepted in place of a manifest, in the order of preference.
pub(crate) const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

const CONFIGS: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];

const LAYERS: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// Where something lies: a descriptor of which only what we need is kept.
#[derive(Debug, Clone)]
pub(crate) struct Pointer {
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    /// Where else it may lie; only of layers that registries may not hold.
    pub urls: Vec<String>,
}

impl Pointer {
    pub fn new(what: &str, descriptor: &Descriptor) -> Result<Self, ImageError> {
        let digest = descriptor.digest().to_string();
        Ok(Self {
            media_type: descriptor.media_type().to_string(),
            digest: digest.parse().map_err(|error| ImageError::Malformed {
                what: what.to_owned(),
                why: format!("{error}"),
            })?,
            size: descriptor.size(),
            urls: Vec::new(),
        })
    }
}

/// A manifest of one image.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub config: Pointer,
    pub layers: Vec<Pointer>,
}

/// What a tag or digest led to.
#[derive(Debug)]
pub(crate) enum Document {
    Manifest(Manifest),
    /// Its entries and its annotations.
    Index(Vec<Descriptor>, BTreeMap<String, String>),
}

impl Document {
    /// Tells manifest from index and reads it. `what` names it in errors.
    pub fn parse(what: &str, json: &[u8]) -> Result<Self, ImageError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Probe {
            schema_version: u32,
            media_type: Option<String>,
            manifests: Option<serde::de::IgnoredAny>,
            #[serde(default)]
            fs_layers: Option<serde::de::IgnoredAny>,
        }
        let malformed = |error: serde_json::Error| ImageError::Malformed {
            what: what.to_owned(),
            why: error.to_string(),
        };
        let probe: Probe = serde_json::from_slice(json).map_err(malformed)?;
        let refuse = |media_type: String, why| {
            Err(ImageError::MediaType {
                what: what.to_owned(),
                media_type,
                why,
            })
        };
        if probe.schema_version != 2 || probe.fs_layers.is_some() {
            let media_type = probe.media_type.unwrap_or_else(|| "none".to_owned());
            return refuse(
                media_type,
                "Docker's schema 1 is not supported; push the image anew with a current tool",
            );
        }
        if let Some(media_type) = probe.media_type
            && !ACCEPTED.contains(&media_type.as_str())
        {
            return refuse(media_type, "this is no image manifest or index");
        }
        if probe.manifests.is_some() {
            let index: ImageIndex = serde_json::from_slice(json).map_err(malformed)?;
            let annotations = index.annotations().iter().flatten();
            let annotations = annotations.map(|(k, v)| (k.clone(), v.clone()));
            return Ok(Self::Index(
                index.manifests().clone(),
                annotations.collect(),
            ));
        }
        let manifest: ImageManifest = serde_json::from_slice(json).map_err(malformed)?;
        Self::manifest(what, &manifest).map(Self::Manifest)
    }

    fn manifest(what: &str, manifest: &ImageManifest) -> Result<Manifest, ImageError> {
        let config = Pointer::new(&format!("the config in {what}"), manifest.config())?;
        let refuse = |what: String, media_type: &str, why| {
            Err(ImageError::MediaType {
                what,
                media_type: media_type.to_owned(),
                why,
            })
        };
        if !CONFIGS.contains(&config.media_type.as_str()) {
            let what = format!("the config in {what}");
            return refuse(
                what,
                &config.media_type,
                "this is an artifact of another kind, not a container image",
            );
        }
        let mut layers = Vec::new();
        for (number, descriptor) in manifest.layers().iter().enumerate() {
            let what = format!("layer {number} ({}) in {what}", descriptor.digest());
            let mut pointer = Pointer::new(&what, descriptor)?;
            let media_type = pointer.media_type.as_str();
            if media_type.ends_with("+encrypted") {
                return refuse(
                    what,
                    media_type,
                    "encrypted layers cannot be converted; decrypt the image first",
                );
            }
            // "Foreign" layers are the same, but registries need not hold them.
            let plain = media_type
                .replace(".nondistributable.", ".")
                .replace(".foreign.", ".");
            if !LAYERS.contains(&plain.as_str()) {
                return refuse(what, media_type, "this is no layer that we know");
            }
            if plain != media_type {
                pointer.urls = descriptor.urls().clone().unwrap_or_default();
            }
            layers.push(pointer);
        }
        Ok(Manifest { config, layers })
    }
}

/// Whether the entry of an index belongs to another image instead of being one.
pub(crate) fn is_attestation(descriptor: &Descriptor) -> bool {
    let marked = descriptor
        .annotations()
        .as_ref()
        .is_some_and(|all| all.contains_key("vnd.docker.reference.type"));
    let unknown = platform_of(descriptor)
        .is_some_and(|platform| platform.os == "unknown" && platform.architecture == "unknown");
    marked || unknown
}

/// For which machines an entry of an index says that it is.
pub(crate) fn platform_of(descriptor: &Descriptor) -> Option<Platform> {
    let platform = descriptor.platform().as_ref()?;
    Some(Platform {
        os: platform.os().to_string(),
        architecture: platform.architecture().to_string(),
        variant: platform.variant().clone().filter(|v| !v.is_empty()),
    })
}

/// The entry of an index that is meant by `wanted`: one with exactly this
/// platform, else the first that it accepts, else the only one that names none.
pub(crate) fn select(
    what: &str,
    entries: &[Descriptor],
    wanted: &Platform,
) -> Result<Descriptor, ImageError> {
    let images: Vec<_> = entries.iter().filter(|e| !is_attestation(e)).collect();
    let find = |accept: &dyn Fn(&Platform) -> bool| {
        let fits = |entry: &&&Descriptor| platform_of(entry).is_some_and(|p| accept(&p));
        images.iter().find(fits).copied()
    };
    let silent: Vec<_> = images.iter().filter(|e| platform_of(e).is_none()).collect();
    let chosen = find(&|offered| offered == wanted)
        .or_else(|| find(&|offered| wanted.accepts(offered)))
        .or(match silent.as_slice() {
            [only] => Some(**only),
            _ => None,
        });
    match chosen {
        Some(descriptor) => Ok(descriptor.clone()),
        None => Err(ImageError::Platform {
            what: what.to_owned(),
            wanted: wanted.clone(),
            offered: images
                .iter()
                .filter_map(|entry| platform_of(entry))
                .map(|platform| platform.to_string())
                .collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn digest(seed: &str) -> String {
        Digest::of(seed.as_bytes()).to_string()
    }

    fn entry(seed: &str, platform: Option<&str>) -> Value {
        let mut entry = json!({
            "mediaType": ACCEPTED[0], "digest": digest(seed), "size": 1,
        });
        if let Some(platform) = platform {
            let platform: Platform = platform.parse().unwrap();
            entry["platform"] = serde_json::to_value(platform).unwrap();
        }
        entry
    }

    fn choose(entries: &[Value], wanted: &str) -> Result<String, ImageError> {
        let index = json!({"schemaVersion": 2, "manifests": entries});
        let Document::Index(entries, _) = Document::parse("it", index.to_string().as_bytes())?
        else {
            panic!("not read as an index");
        };
        let entry = select("it", &entries, &wanted.parse().unwrap())?;
        let pointer = Pointer::new("it", &entry)?;
        Ok(pointer.digest.to_string())
    }

    #[test]
    fn the_entry_for_the_platform_is_taken() {
        let entries = [
            entry("attestation", Some("unknown/unknown")),
            entry("6", Some("linux/arm/v6")),
            entry("7", Some("linux/arm/v7")),
            entry("amd", Some("linux/amd64")),
        ];
        for (wanted, seed) in [
            ("linux/amd64", "amd"),
            ("linux/arm/v7", "7"),
            ("linux/arm", "6"),
        ] {
            assert_eq!(choose(&entries, wanted).unwrap(), digest(seed));
        }
        let error = choose(&entries, "linux/s390x").unwrap_err().to_string();
        assert!(error.contains("linux/arm/v7"), "{error}");
        assert!(!error.contains("unknown"), "{error}");
    }

    #[test]
    fn a_single_entry_need_not_name_its_platform_and_attestations_do_not_count() {
        let mut attestation = entry("a", None);
        attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
        let entries = [attestation, entry("x", None)];
        assert_eq!(choose(&entries, "linux/amd64").unwrap(), digest("x"));
        assert!(choose(&[entry("x", None), entry("y", None)], "linux/amd64").is_err());
        assert!(choose(&[], "linux/amd64").is_err());
    }

    fn manifest(config: &str, layer: &str) -> Result<Document, ImageError> {
        let json = json!({
            "schemaVersion": 2,
            "config": {"mediaType": config, "digest": digest("c"), "size": 2},
            "layers": [{"mediaType": layer, "digest": digest("l"), "size": 3}],
        });
        Document::parse("it", json.to_string().as_bytes())
    }

    #[test]
    fn manifests_of_both_kinds_are_read_and_media_types_kept() {
        for layer in LAYERS {
            for config in CONFIGS {
                let Document::Manifest(manifest) = manifest(config, layer).unwrap() else {
                    panic!("not read as a manifest");
                };
                assert_eq!(manifest.layers[0].media_type, layer);
                assert_eq!(manifest.layers[0].size, 3);
                assert_eq!(manifest.config.digest.to_string(), digest("c"));
            }
        }
    }

    #[test]
    fn what_is_no_plain_image_is_refused_by_its_media_type() {
        let helm = "application/vnd.cncf.helm.config.v1+json";
        for (config, layer, named) in [
            (helm, LAYERS[0], helm),
            (
                CONFIGS[0],
                "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
                "encrypted",
            ),
            (CONFIGS[0], "application/x-other", "application/x-other"),
        ] {
            let error = manifest(config, layer).unwrap_err();
            assert!(matches!(error, ImageError::MediaType { .. }));
            assert!(error.to_string().contains(named), "{error}");
        }
        for json in [
            json!({"schemaVersion": 1, "fsLayers": []}),
            json!({"schemaVersion": 2, "mediaType": "text/x", "layers": []}),
        ] {
            let error = Document::parse("it", json.to_string().as_bytes()).unwrap_err();
            assert!(matches!(error, ImageError::MediaType { .. }), "{error}");
        }
    }

    #[test]
    fn digests_we_cannot_check_are_refused() {
        let entry = json!({
            "mediaType": ACCEPTED[0], "size": 1,
            "digest": format!("sha512:{}", "0".repeat(128)),
        });
        let error = choose(&[entry], "linux/amd64").unwrap_err().to_string();
        assert!(error.contains("sha512"), "{error}");
    }
}
