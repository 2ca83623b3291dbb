//! An image's config: what of it a converted image keeps.

use crate::ImageError;
use accel_oci::{DiffId, Platform};
use oci_spec::image::ImageConfiguration;

/// What the config says about the process to run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessConfig {
    /// `NAME=value` each.
    pub env: Vec<String>,
    /// The first words of the command.
    pub entrypoint: Vec<String>,
    /// The words after, replaced by a user's own.
    pub cmd: Vec<String>,
    /// Where it starts.
    pub working_dir: String,
    /// `user[:group]`, names or numbers.
    pub user: String,
}

/// A parsed config.
#[derive(Debug)]
pub(crate) struct Config {
    pub platform: Platform,
    pub process: ProcessConfig,
    pub diff_ids: Vec<DiffId>,
}

impl Config {
    pub fn parse(what: &str, json: &[u8]) -> Result<Self, ImageError> {
        let malformed = |why: String| ImageError::Malformed {
            what: what.to_owned(),
            why,
        };
        let parsed: ImageConfiguration =
            serde_json::from_slice(json).map_err(|error| malformed(error.to_string()))?;
        let rootfs = parsed.rootfs();
        if rootfs.typ() != "layers" {
            return Err(malformed(format!(
                "its rootfs is of type {:?} instead of \"layers\"",
                rootfs.typ()
            )));
        }
        let diff_id = |text: &String| {
            let digest = text.parse();
            digest
                .map(DiffId)
                .map_err(|error| malformed(format!("rootfs.diff_ids: {error}")))
        };
        let process = parsed.config().as_ref().map(|config| ProcessConfig {
            env: config.env().clone().unwrap_or_default(),
            entrypoint: config.entrypoint().clone().unwrap_or_default(),
            cmd: config.cmd().clone().unwrap_or_default(),
            working_dir: config.working_dir().clone().unwrap_or_default(),
            user: config.user().clone().unwrap_or_default(),
        });
        Ok(Self {
            platform: Platform {
                os: parsed.os().to_string(),
                architecture: parsed.architecture().to_string(),
                variant: parsed.variant().clone().filter(|v| !v.is_empty()),
            },
            process: process.unwrap_or_default(),
            diff_ids: rootfs
                .diff_ids()
                .iter()
                .map(diff_id)
                .collect::<Result<_, _>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(json: &serde_json::Value) -> Result<Config, ImageError> {
        Config::parse("the config", json.to_string().as_bytes())
    }

    #[test]
    fn what_docker_writes_is_read() {
        let diff_id = format!("sha256:{}", "ab".repeat(32));
        let config = parse(&json!({
            "architecture": "arm64", "os": "linux", "variant": "v8",
            "config": {
                "Env": ["PATH=/bin"], "Cmd": ["sh"], "Entrypoint": null, "User": "1:2",
                "WorkingDir": "/srv", "Volumes": null, "OnBuild": null, "Labels": null,
                "ArgsEscaped": true, "Image": "",
            },
            "created": "2024-01-01T00:00:00Z",
            "history": [{"created_by": "x", "empty_layer": true}],
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
            "docker_version": "20.10",
        }))
        .unwrap();
        assert_eq!(config.platform.to_string(), "linux/arm64/v8");
        assert_eq!(config.process.cmd, ["sh"]);
        assert!(config.process.entrypoint.is_empty());
        assert_eq!(config.process.working_dir, "/srv");
        assert_eq!(config.diff_ids[0].to_string(), diff_id);
    }

    #[test]
    fn a_config_without_a_process_is_read() {
        let rootfs = json!({"type": "layers", "diff_ids": []});
        let config = parse(&json!({"architecture": "amd64", "os": "linux", "rootfs": rootfs}));
        assert_eq!(config.unwrap().process, ProcessConfig::default());
    }

    #[test]
    fn a_wrong_field_is_named() {
        for (rootfs, named) in [
            (json!({"type": "other", "diff_ids": []}), "\"other\""),
            (json!({"type": "layers", "diff_ids": ["md5:1"]}), "md5:1"),
            (json!({"type": "layers"}), "diff_ids"),
        ] {
            let json = json!({"architecture": "amd64", "os": "linux", "rootfs": rootfs});
            let error = parse(&json).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
