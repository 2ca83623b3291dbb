//! For which machines an image is.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A text that names no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a platform: expected OS/ARCHITECTURE[/VARIANT], such as linux/arm64")]
pub struct PlatformError {
    /// What was given.
    pub text: String,
}

/// Operating system and architecture in Go's words, as in an image's config.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// Such as `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// Linux on the architecture that this program was built for.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "loongarch64" => "loong64",
            same => same,
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: None,
        }
    }

    /// Whether an image for `offered` is what `self` asks for: a variant counts
    /// only where both name one.
    pub fn accepts(&self, offered: &Self) -> bool {
        self.os == offered.os
            && self.architecture == offered.architecture
            && (self.variant.is_none()
                || offered.variant.is_none()
                || self.variant == offered.variant)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let mut parts = text.split('/').map(str::to_owned);
        let mut part = || parts.next().filter(|part| !part.is_empty());
        let (os, architecture) = (part(), part());
        let variant = parts.next();
        match (os, architecture, parts.next()) {
            (Some(os), Some(architecture), None) if variant.as_deref() != Some("") => Ok(Self {
                os,
                architecture,
                variant,
            }),
            _ => Err(PlatformError {
                text: text.to_owned(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_read_back_as_written_and_nothing_else_is_taken() {
        for text in ["linux/amd64", "linux/arm/v7"] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), text);
        }
        for text in ["", "linux", "linux/", "/amd64", "linux/arm/", "a/b/c/d"] {
            assert!(text.parse::<Platform>().is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn a_variant_counts_only_where_both_name_one() {
        let accepts = |wanted: &str, offered: &str| {
            let wanted: Platform = wanted.parse().unwrap();
            wanted.accepts(&offered.parse().unwrap())
        };
        assert!(accepts("linux/arm64", "linux/arm64/v8"));
        assert!(accepts("linux/arm64/v8", "linux/arm64"));
        assert!(!accepts("linux/arm/v7", "linux/arm/v6"));
        assert!(!accepts("linux/arm64", "linux/amd64"));
        assert!(!accepts("linux/amd64", "windows/amd64"));
    }
}
