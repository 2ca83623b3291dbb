//! Removing a tag, where the registry lets us.

use super::Registry;
use super::failure::Failure;
use super::http::{self, Http};
use crate::ImageError;
use crate::image::MAX_MANIFEST;
use crate::manifest::ACCEPTED;
use accel_oci::{Digest, Version};
use serde_json::Value;

/// What became of a tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Untagged {
    /// It is gone.
    Gone,
    /// There was none.
    Absent,
    /// Somebody has put another image there: it stays.
    Foreign,
    /// The registry does not remove it, and why: it stays.
    Refused(String),
}

impl Registry {
    /// Removes the tag that was opened if its manifest has the annotation `key` with one of
    /// the values `ours`. By its manifest's digest if need be, with all tags that it has in
    /// the repository, unless the manifest is `shared`.
    pub(crate) fn untag(
        &self,
        key: &str,
        ours: &[String],
        shared: bool,
    ) -> Result<Untagged, ImageError> {
        let host = self.pushed_to()?;
        let tag = match &self.source.version {
            Version::Tag(tag) => tag.clone(),
            Version::Digest(digest) => digest.to_string(),
        };
        let what = format!("the tag {tag:?} of {:?}", self.source.repository);
        let done = self.runtime.block_on(async {
            let most = usize::try_from(MAX_MANIFEST).unwrap_or(usize::MAX);
            let (path, accept) = (format!("manifests/{tag}"), ACCEPTED.join(", "));
            let json = match host.get(&path, &accept, 0).await {
                Ok(response) => http::read(response, most).await?,
                Err(failure) if failure.is_absent() => return Ok(Untagged::Absent),
                Err(failure) if failure.may_pass() => return Err(failure),
                Err(failure) => return Ok(Untagged::Refused(host.explain_removal(&failure))),
            };
            let manifest: Value = serde_json::from_slice(&json).unwrap_or_default();
            let original = manifest["annotations"][key].as_str();
            if !original.is_some_and(|original| ours.iter().any(|our| our == original)) {
                return Ok(Untagged::Foreign);
            }
            // Older registries take digests only.
            let refused = match delete(host, &tag).await {
                Ok(()) => return Ok(Untagged::Gone),
                Err(failure) if failure.may_pass() => return Err(failure),
                Err(failure) => failure,
            };
            if shared {
                return Ok(Untagged::Refused(format!(
                    "{}; and its manifest has tags of others",
                    host.explain_removal(&refused)
                )));
            }
            match delete(host, &Digest::of(&json).to_string()).await {
                Ok(()) => Ok(Untagged::Gone),
                Err(failure) if failure.is_absent() => Ok(Untagged::Absent),
                Err(failure) if failure.may_pass() => Err(failure),
                Err(failure) => Ok(Untagged::Refused(host.explain_removal(&failure))),
            }
        });
        done.map_err(|failure: Failure| ImageError::Remove {
            registry: host.registry.clone(),
            what,
            why: host.explain_removal(&failure),
        })
    }
}

async fn delete(http: &Http, version: &str) -> Result<(), Failure> {
    let url = http.url(&format!("manifests/{version}"))?;
    http.ask(|client| client.delete(url.clone()))
        .await
        .map(drop)
}

impl Http {
    fn explain_removal(&self, failure: &Failure) -> String {
        match failure {
            Failure::Status { code, .. } if matches!(code.as_u16(), 405 | 501) => {
                format!("the registry removes no tags ({})", code.as_u16())
            }
            failure => self
                .explain(failure)
                .replace("the right to pull", "the right to delete"),
        }
    }
}
