//! Where an accelerated image goes.

use crate::accelerated::{Accelerated, Annotations, Document};
use crate::image::{Image, Layer};
use crate::layout_write::LayoutWriter;
use crate::registry::{Registry, Untagged};
use crate::{ImageError, OpenOptions};
use accel_oci::{Digest, ImageSource, RegistryReference, Version};

/// A place that an image can be written to: a layout directory, or a repository.
pub struct Target {
    name: String,
    place: Place,
}

enum Place {
    Layout(LayoutWriter),
    Registry {
        registry: Box<Registry>,
        /// The original's repository, if it is in the same registry.
        from: Option<RegistryReference>,
    },
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Target({})", self.name)
    }
}

impl Target {
    /// Opens `target` for an image that comes from `source`, and makes sure that it
    /// can be written to.
    pub fn open(
        target: &ImageSource,
        options: &OpenOptions,
        source: &ImageSource,
    ) -> Result<Self, ImageError> {
        let place = match target {
            ImageSource::Oci(reference) => Place::Layout(LayoutWriter::open(reference)?),
            ImageSource::Registry(reference) => {
                if matches!(reference.version, Version::Digest(_)) {
                    return Err(ImageError::Target {
                        target: target.to_string(),
                        why: "an accelerated image has a digest of its own: name a tag",
                    });
                }
                let registry = Box::new(Registry::open_for_push(reference, options)?);
                registry.check_push()?;
                let from = match source {
                    ImageSource::Registry(source) if source.registry == reference.registry => {
                        Some(source.clone())
                    }
                    _ => None,
                };
                Place::Registry { registry, from }
            }
            ImageSource::OciArchive(_) | ImageSource::DockerArchive(_) => {
                return Err(ImageError::Target {
                    target: target.to_string(),
                    why: "archives are not written, only oci:DIR and docker://",
                });
            }
        };
        Ok(Self {
            name: target.to_string(),
            place,
        })
    }

    /// Writes what is missing of the images: configs and layers, then the manifests
    /// with the annotations, and of several an index of them, which has the
    /// annotations `index`. Gives the digest that the tag points to.
    pub fn write(
        &self,
        images: &[Accelerated<'_>],
        index: &Annotations,
    ) -> Result<Digest, ImageError> {
        let manifests = images.iter().map(Document::manifest);
        let manifests = manifests.collect::<Result<Vec<_>, _>>()?;
        for Accelerated { image, .. } in images {
            match &self.place {
                Place::Layout(layout) => {
                    layout.write_blob(image.config, &mut &*image.config_json)?;
                }
                Place::Registry { registry, .. } => {
                    registry.push_config(image.config, &image.config_json)?;
                }
            }
            for layer in &image.layers {
                self.write_layer(image, layer)?;
            }
        }
        if let [only] = &manifests[..] {
            self.write_document(only)?;
            return Ok(only.digest);
        }
        for manifest in &manifests {
            match &self.place {
                Place::Layout(layout) => {
                    layout.write_blob(manifest.digest, &mut &*manifest.json)?;
                }
                Place::Registry { registry, .. } => registry.push_by_digest(manifest)?,
            }
        }
        let members = manifests.iter().zip(images.iter().map(|one| one.image));
        let index = Document::index(members, index);
        self.write_document(&index)?;
        Ok(index.digest)
    }

    /// Writes what the tag is to point to.
    fn write_document(&self, document: &Document) -> Result<(), ImageError> {
        match &self.place {
            Place::Layout(layout) => layout.write_document(document),
            Place::Registry { registry, .. } => registry.push_tagged(document),
        }
    }

    fn write_layer(&self, image: &Image, layer: &Layer) -> Result<(), ImageError> {
        match &self.place {
            Place::Layout(layout) if layout.has_blob(layer.digest, layer.size) => Ok(()),
            Place::Layout(layout) => {
                layout.write_blob(layer.digest, &mut *image.open_layer(layer)?)
            }
            Place::Registry { registry, from } => registry.push_layer(image, layer, from.as_ref()),
        }
    }
}

/// Takes an accelerated image's tag away. `key` is the annotation by which ours are known,
/// `ours` its values; what has another one stays. A registry that takes digests only loses
/// the manifest with all of its tags, unless it is `shared`.
///
/// # Errors
/// The registry cannot be reached, or fails. Not that it refuses: see [`Untagged::Refused`].
pub fn remove_tag(
    target: &RegistryReference,
    options: &OpenOptions,
    key: &str,
    ours: &[String],
    shared: bool,
) -> Result<Untagged, ImageError> {
    Registry::open_for_push(target, options)?.untag(key, ours, shared)
}
