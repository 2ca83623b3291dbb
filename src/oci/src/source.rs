//! Where an image comes from, as containers-transports(5) writes it.

use crate::{Digest, DigestError};
use std::{fmt, path::PathBuf, str::FromStr};

/// A text that names no image source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// The transport before the first colon is none of ours.
    #[error(
        "{text:?} names no image: expected docker://HOST[:PORT]/REPO[:TAG|@DIGEST], oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:NAME[:TAG]]"
    )]
    Transport {
        /// What was given.
        text: String,
    },
    /// The directory of `oci:`, or the file of an archive, is empty.
    #[error("{text:?} names no {what}")]
    Empty {
        /// `directory` or `file`.
        what: &'static str,
        /// What was given.
        text: String,
    },
    /// The repository of `docker://` is missing or malformed.
    #[error("{text:?}: {what}; expected docker://HOST[:PORT]/REPO[:TAG|@DIGEST]")]
    Repository {
        /// What was given.
        text: String,
        /// Which part is wrong.
        what: &'static str,
    },
    /// What follows the `@` is no digest.
    #[error("{text:?}: {source}")]
    Digest {
        /// What was given.
        text: String,
        /// Why it is no digest.
        source: DigestError,
    },
}

/// An image in an OCI layout directory: `oci:DIR[:TAG]`.
///
/// Without a tag the layout must hold exactly one image.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OciReference {
    /// The layout directory, holding `oci-layout` and `index.json`.
    pub directory: PathBuf,
    /// Value of the annotation `org.opencontainers.image.ref.name`.
    pub tag: Option<String>,
}

/// An image in an archive: `oci-archive:FILE[:TAG]` or
/// `docker-archive:FILE[:NAME[:TAG]|:@INDEX]`.
///
/// Without a name the archive must hold exactly one image.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ArchiveReference {
    /// The tar.
    pub file: PathBuf,
    /// As in [`OciReference::tag`]; for Docker's a reference as `docker save` notes
    /// it, or `@` and the image's place from 0.
    pub name: Option<String>,
}

/// Which version of a repository is meant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Version {
    /// A tag, which may move.
    Tag(String),
    /// A manifest or index digest.
    Digest(Digest),
}

/// An image in a registry: `docker://HOST[:PORT]/REPO[:TAG|@DIGEST]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RegistryReference {
    /// `HOST[:PORT]`.
    pub registry: String,
    /// The repository's name, with `/` between its components.
    pub repository: String,
    /// The tag (`latest` when none is given) or digest.
    pub version: Version,
}

/// Where an image comes from.
///
/// `Display` writes the canonical form: the tag is spelled out for registries,
/// so that equal sources print equal texts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ImageSource {
    /// `oci:DIR[:TAG]`
    Oci(OciReference),
    /// `oci-archive:FILE[:TAG]`: a tar of an OCI layout.
    OciArchive(ArchiveReference),
    /// `docker-archive:FILE[:NAME[:TAG]|:@INDEX]`: what `docker save` writes.
    DockerArchive(ArchiveReference),
    /// `docker://HOST[:PORT]/REPO[:TAG|@DIGEST]`
    Registry(RegistryReference),
}

impl FromStr for ImageSource {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        if let Some(rest) = text.strip_prefix("docker://") {
            return registry(text, rest).map(Self::Registry);
        }
        // As in containers-transports(5): the path ends at the first colon.
        let path = |rest: &str, what| {
            let (path, name) = match rest.split_once(':') {
                Some((path, name)) => (path, Some(name.to_owned())),
                None => (rest, None),
            };
            match path.is_empty() {
                true => Err(SourceError::Empty {
                    text: text.to_owned(),
                    what,
                }),
                false => Ok((PathBuf::from(path), name.filter(|name| !name.is_empty()))),
            }
        };
        let archive = |rest| {
            let (file, name) = path(rest, "file")?;
            Ok(ArchiveReference { file, name })
        };
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            return archive(rest).map(Self::OciArchive);
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            return archive(rest).map(Self::DockerArchive);
        }
        let Some(rest) = text.strip_prefix("oci:") else {
            return Err(SourceError::Transport {
                text: text.to_owned(),
            });
        };
        let (directory, tag) = path(rest, "directory")?;
        Ok(Self::Oci(OciReference { directory, tag }))
    }
}

fn registry(text: &str, rest: &str) -> Result<RegistryReference, SourceError> {
    let wrong = |what| SourceError::Repository {
        text: text.to_owned(),
        what,
    };
    let (registry, path) = rest
        .split_once('/')
        .ok_or_else(|| wrong("the repository is missing"))?;
    if registry.is_empty() {
        return Err(wrong("the host is missing"));
    }
    let (repository, version) = if let Some((repository, digest)) = path.split_once('@') {
        let digest = digest.parse().map_err(|source| SourceError::Digest {
            text: text.to_owned(),
            source,
        })?;
        // "repo:tag@digest": the digest decides, as everywhere else.
        let repository = repository.split_once(':').map_or(repository, |(r, _)| r);
        (repository, Version::Digest(digest))
    } else if let Some((repository, tag)) = path.split_once(':') {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if tag.is_empty() || tag.len() > 128 || !tag.chars().all(plain) {
            return Err(wrong("the tag is malformed"));
        }
        (repository, Version::Tag(tag.to_owned()))
    } else {
        (path, Version::Tag("latest".to_owned()))
    };
    let component = |part: &str| {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
        part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && part.chars().all(plain)
    };
    if !repository.split('/').all(component) {
        return Err(wrong("the repository is malformed (lower case only)"));
    }
    Ok(RegistryReference {
        registry: registry.to_owned(),
        repository: repository.to_owned(),
        version,
    })
}

impl fmt::Display for RegistryReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "docker://{}/{}", self.registry, self.repository)?;
        match &self.version {
            Version::Tag(tag) => write!(f, ":{tag}"),
            Version::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}

impl fmt::Display for OciReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "oci:{}", self.directory.display())?;
        match &self.tag {
            Some(tag) => write!(f, ":{tag}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for ArchiveReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        match &self.name {
            Some(name) => write!(f, ":{name}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Oci(reference) => reference.fmt(f),
            Self::OciArchive(reference) => write!(f, "oci-archive:{reference}"),
            Self::DockerArchive(reference) => write!(f, "docker-archive:{reference}"),
            Self::Registry(reference) => reference.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ImageSource, SourceError> {
        text.parse()
    }

    #[test]
    fn sources_print_in_their_canonical_form() {
        let digest = Digest::of(b"x");
        for (given, canonical) in [
            ("oci:/a/b", "oci:/a/b".to_owned()),
            ("oci:a:", "oci:a".to_owned()),
            ("oci:a:v1", "oci:a:v1".to_owned()),
            ("oci-archive:a.tar:v1", "oci-archive:a.tar:v1".to_owned()),
            (
                "docker-archive:/a.tar:h:5000/r:v1",
                "docker-archive:/a.tar:h:5000/r:v1".to_owned(),
            ),
            ("docker-archive:a", "docker-archive:a".to_owned()),
            ("docker://h/r", "docker://h/r:latest".to_owned()),
            (
                "docker://h:5000/a/b:v1",
                "docker://h:5000/a/b:v1".to_owned(),
            ),
            (
                &format!("docker://h/r:v1@{digest}"),
                format!("docker://h/r@{digest}"),
            ),
        ] {
            assert_eq!(parse(given).unwrap().to_string(), canonical);
        }
    }

    #[test]
    fn what_names_no_image_is_refused_with_the_text() {
        for text in [
            "",
            "debian",
            "oci:",
            "oci-archive:",
            "docker-archive::tag",
            "docker://host",
            "docker:///repo",
            "docker://host/",
            "docker://host/Repo",
            "docker://host/r:",
            "docker://host/r:a/b",
            "docker://host/r@sha256:12",
            "docker://host/../r",
            "docker-daemon:x",
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
