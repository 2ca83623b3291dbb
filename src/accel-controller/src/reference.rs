//! What a task's images are called.

use crate::resource::{AcceleratedImageSpec, RegistrySpec};
use accel_oci::{ImageSource, RegistryReference, Version};

/// Behind the source's tag, unless a target is named.
const SUFFIX: &str = "-acc";

/// The longest tag that registries take.
const MAX_TAG: usize = 128;

/// A task's images, as `mkfs-accel` writes them: `docker://HOST[:PORT]/REPO…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// What is converted.
    pub source: String,
    /// What is pushed.
    pub target: String,
}

/// A field of a task that cannot be worked with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct SpecError {
    /// Its path.
    pub field: &'static str,
    /// What is wrong with it, and what would be right.
    pub problem: String,
}

impl Names {
    /// Those of a task.
    pub fn of(spec: &AcceleratedImageSpec, registry: &RegistrySpec) -> Result<Self, SpecError> {
        let source = parse(&spec.source, "spec.source")?;
        let target = match &spec.target {
            Some(target) => parse(target, "spec.target")?,
            None => beside(&spec.source, &source, registry)?,
        };
        if target == source {
            return Err(SpecError {
                field: "spec.target",
                problem: "is the source itself: choose another tag, such as the source's with -acc"
                    .to_owned(),
            });
        }
        Ok(Self {
            source: source.to_string(),
            target: target.to_string(),
        })
    }

    /// The target without transport, as pods name it.
    pub fn image(&self) -> &str {
        self.target.trim_start_matches("docker://")
    }
}

fn parse(text: &str, field: &'static str) -> Result<RegistryReference, SpecError> {
    match format!("docker://{text}").parse() {
        Ok(ImageSource::Registry(reference)) => Ok(reference),
        Ok(_) => Err(SpecError {
            field,
            problem: "is not an image in a registry".to_owned(),
        }),
        Err(error) => Err(SpecError {
            field,
            problem: error.to_string(),
        }),
    }
}

fn beside(
    text: &str,
    source: &RegistryReference,
    registry: &RegistrySpec,
) -> Result<RegistryReference, SpecError> {
    // The tag counts here also if a digest stands behind it.
    let name = text.split('@').next().unwrap_or_default();
    let last = name.rsplit('/').next().unwrap_or_default();
    let tag = match (last.split_once(':'), &source.version) {
        (Some((_, tag)), _) => tag,
        (None, Version::Tag(tag)) => tag,
        (None, Version::Digest(_)) => {
            return Err(SpecError {
                field: "spec.target",
                problem: "is needed, because the source has no tag that it could be made from"
                    .to_owned(),
            });
        }
    };
    let tag = format!("{tag}{SUFFIX}");
    if tag.len() > MAX_TAG {
        return Err(SpecError {
            field: "spec.target",
            problem: format!(
                "is needed, because the source's tag with {SUFFIX} is longer than {MAX_TAG} characters"
            ),
        });
    }
    let repository = &source.repository;
    let target = match &registry.push_to {
        Some(prefix) => format!("{prefix}/{repository}:{tag}"),
        None => format!("{}/{repository}:{tag}", source.registry),
    };
    parse(&target, "spec.target")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(source: &str, target: Option<&str>, push_to: Option<&str>) -> Result<Names, String> {
        let spec = AcceleratedImageSpec {
            source: source.to_owned(),
            target: target.map(str::to_owned),
            platforms: Vec::new(),
            secret_name: None,
        };
        let registry = RegistrySpec {
            push_to: push_to.map(str::to_owned),
            ..RegistrySpec::default()
        };
        Names::of(&spec, &registry).map_err(|error| error.to_string())
    }

    #[test]
    fn targets_follow_from_the_source() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for (source, target, push_to, expected) in [
            ("h:5000/a/b:v1", None, None, "h:5000/a/b:v1-acc"),
            ("h/a", None, None, "h/a:latest-acc"),
            (&format!("h/a:v1@{digest}"), None, None, "h/a:v1-acc"),
            ("h/a:v1", None, Some("other:5000"), "other:5000/a:v1-acc"),
            ("h/a:v1", None, Some("other/team"), "other/team/a:v1-acc"),
            ("h/a:v1", Some("h/b:fast"), Some("other"), "h/b:fast"),
            (&format!("h/a@{digest}"), Some("h/a:x"), None, "h/a:x"),
        ] {
            let names = names(source, target, push_to).unwrap();
            assert_eq!(names.image(), expected, "{source}");
        }
    }

    #[test]
    fn what_cannot_be_is_told_with_the_field() {
        let long = format!("h/a:{}", "x".repeat(125));
        let digest = format!("h/a@sha256:{}", "0".repeat(64));
        for (source, target, field) in [
            ("h/a:v1", Some("h/a:v1"), "spec.target: is the source"),
            ("h/a", Some("h/a:latest"), "spec.target: is the source"),
            (digest.as_str(), None, "spec.target: is needed"),
            (long.as_str(), None, "spec.target: is needed"),
            ("h", None, "spec.source: "),
            ("h/a:v1", Some("h/A:v1"), "spec.target: "),
        ] {
            let error = names(source, target, None).unwrap_err();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
