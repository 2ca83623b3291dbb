//! Whether registries take the logins that there are for them.

use super::Registry;
use super::failure::Failure;
use crate::{ImageError, OpenOptions, Problem};
use accel_oci::{RegistryReference, Version};
use serde_json::Value;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// Longer than any file of logins, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Asks `registry` (`HOST[:PORT]`) whether it lets in whom `options` name: the base of its
/// API, which wants what all of it wants. One that lets everybody in takes every login.
///
/// # Errors
/// [`ImageError::Login`]: it does not, does not answer, or is no registry.
pub fn check_login(registry: &str, options: &OpenOptions) -> Result<(), ImageError> {
    let reference = RegistryReference {
        registry: registry.to_owned(),
        repository: String::new(),
        version: Version::Tag(String::new()),
    };
    let opened = Registry::open(&reference, options)?;
    // Mirrors come before it, and have logins of their own.
    let host = opened.hosts.last();
    let host = host.ok_or_else(|| ImageError::Setup(format!("there is no host for {registry}")))?;
    let asked = opened.runtime.block_on(async {
        let url = host.url("")?;
        host.ask(|client| client.get(url.clone())).await
    });
    asked.map(drop).map_err(|failure| {
        let (why, problem) = match &failure {
            // No image was asked for.
            Failure::Status { code, .. } if code.as_u16() == 404 => (
                "there is no registry at this address (404)".to_owned(),
                Problem::Other,
            ),
            failure => (host.explain(failure), host.problem(failure)),
        };
        ImageError::Login {
            registry: registry.to_owned(),
            why,
            problem,
        }
    })
}

/// The registries that a file like docker's `config.json` has logins for, sorted.
///
/// # Errors
/// [`ImageError::LoginFile`]: it cannot be read, or is none.
pub fn logins(path: &Path) -> Result<Vec<String>, ImageError> {
    let unusable = |why: String| ImageError::LoginFile {
        path: path.to_owned(),
        why,
    };
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE).read_to_string(&mut text))
        .map_err(|error| unusable(error.to_string()))?;
    // What is wrong with it is not told: the words around it may be a password.
    let config: Value =
        serde_json::from_str(&text).map_err(|_| unusable("it is no JSON".to_owned()))?;
    let names = ["auths", "credHelpers"].map(|key| config[key].as_object());
    let names = names.into_iter().flatten().flat_map(|all| all.keys());
    let mut names: Vec<_> = names.map(|name| plain(name)).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

/// A registry's name as images have it.
fn plain(name: &str) -> String {
    let host = name.split_once("://").map_or(name, |(_, rest)| rest);
    match host.split('/').next().unwrap_or_default() {
        "index.docker.io" => "docker.io".to_owned(),
        host => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_of_a_file_are_named_as_images_name_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        let text = r#"{"auths": {"https://index.docker.io/v1/": {}, "h:5000": {"auth": "x"},
            "https://other/v2/": {}}, "credHelpers": {"h:5000": "x", "third": "y"}}"#;
        std::fs::write(&path, text).unwrap();
        let found = logins(&path).unwrap();
        assert_eq!(found, ["docker.io", "h:5000", "other", "third"]);
        std::fs::write(&path, "{\"auths\": {\"h\": s3kr1t").unwrap();
        let error = logins(&path).unwrap_err();
        assert_eq!(error.refusal(), Some(("", Problem::NoLoginFile)));
        assert!(!error.to_string().contains("s3kr1t"), "{error}");
        assert!(logins(&directory.path().join("none")).is_err());
    }
}
