//! Where an accelerated image goes.

use crate::accelerated::{self, Annotations};
use crate::image::{Image, Layer};
use crate::layout_write::LayoutWriter;
use crate::registry::Registry;
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
                let registry = Box::new(Registry::open(reference, options)?);
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

    /// Writes what is missing of `image`: its config and layers, then the manifest
    /// with the annotations; `layers` has those of each layer, lowest first. Gives the
    /// manifest's digest.
    pub fn write(
        &self,
        image: &Image,
        own: &Annotations,
        layers: &[Annotations],
    ) -> Result<Digest, ImageError> {
        let manifest = accelerated::manifest(image, own, layers)?;
        match &self.place {
            Place::Layout(layout) => layout.write_blob(image.config, &mut &*image.config_json)?,
            Place::Registry { registry, .. } => {
                registry.push_config(image.config, &image.config_json)?;
            }
        }
        for layer in &image.layers {
            self.write_layer(image, layer)?;
        }
        let digest = Digest::of(&manifest);
        match &self.place {
            Place::Layout(layout) => layout.write_manifest(digest, &manifest, image)?,
            Place::Registry { registry, .. } => registry.push_manifest(&manifest)?,
        }
        Ok(digest)
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
