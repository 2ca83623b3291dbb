//! A containerd of Debian's, running for one test: it unpacks images, and shows them.

use sha2::{Digest, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

/// Where Debian's package of that name was unpacked.
pub fn package(name: &str) -> Option<PathBuf> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tools/lib/unpack-deb");
    match Command::new(script).arg(name).output() {
        Ok(output) if output.status.success() => {
            let path = String::from_utf8(output.stdout).expect("a path");
            Some(path.trim().into())
        }
        _ => super::tools::missing(&format!(
            "the package {name} could not be fetched (tools/lib/unpack-deb)"
        )),
    }
}

/// A daemon with a root of its own, until dropped.
pub struct Containerd {
    daemon: Child,
    programs: PathBuf,
    directory: tempfile::TempDir,
}

impl Containerd {
    pub fn start() -> Option<Self> {
        let programs = package("containerd")?.join("usr/bin");
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().display();
        let config = format!(
            "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
             [grpc]\naddress = \"{at}/socket\"\n[ttrpc]\naddress = \"{at}/socket.ttrpc\"\n"
        );
        fs::write(directory.path().join("config.toml"), config).unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let daemon = Command::new(programs.join("containerd"))
            .arg("--config")
            .arg(directory.path().join("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut this = Self {
            daemon,
            programs,
            directory,
        };
        for _ in 0..300 {
            if this.ctr(&["version"]).is_ok() {
                return Some(this);
            }
            assert!(
                this.daemon.try_wait().unwrap().is_none(),
                "containerd ended: {}",
                this.log()
            );
            thread::sleep(Duration::from_millis(100));
        }
        panic!("containerd does not answer: {}", this.log());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Runs its client; what it printed, or what it said was wrong.
    fn ctr(&self, args: &[&str]) -> Result<String, String> {
        let output = Command::new(self.programs.join("ctr"))
            .arg("--address")
            .arg(self.directory.path().join("socket"))
            .args(args)
            .output()
            .unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout).unwrap()),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        }
    }

    /// Takes images in: names (letters, digits, '-') and uncompressed layers.
    pub fn import(&self, images: &[(&str, &[Vec<u8>])]) {
        let archive = self.directory.path().join("images.tar");
        fs::write(&archive, oci_archive(images)).unwrap();
        let path = archive.to_str().unwrap();
        self.ctr(&[
            "images",
            "import",
            "--no-unpack",
            "--base-name",
            "test/image",
            path,
        ])
        .unwrap_or_else(|error| panic!("{error}"));
        fs::remove_file(archive).unwrap();
    }

    /// Unpacks and mounts an image that was taken in, read-only.
    pub fn mount(&self, name: &str) -> Result<Unpacked, String> {
        let target = tempfile::tempdir().unwrap();
        let image = format!("test/image:{name}");
        let path = target.path().to_str().unwrap().to_owned();
        self.ctr(&["images", "mount", &image, &path])?;
        let mut unpacked = Unpacked {
            target,
            layers: vec![],
        };
        unpacked.layers = unpacked.find_layers(&self.directory.path().join("root"));
        Ok(unpacked)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let pid = self.daemon.id().cast_signed();
        if let Some(pid) = rustix::process::Pid::from_raw(pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.daemon.wait();
    }
}

/// An image that containerd unpacked, mounted until dropped.
pub struct Unpacked {
    target: tempfile::TempDir,
    /// What each layer's snapshot holds, the lowest first.
    pub layers: Vec<PathBuf>,
}

impl Unpacked {
    pub fn path(&self) -> &Path {
        self.target.path()
    }

    fn find_layers(&self, root: &Path) -> Vec<PathBuf> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let target = self.target.path().to_str().unwrap();
        let line = mounts
            .lines()
            .find(|line| line.split(' ').nth(4) == Some(target));
        let line = line.expect("the image is mounted");
        if let Some(lower) = line.split("lowerdir=").nth(1) {
            let lower = lower.split([',', ' ']).next().unwrap();
            return lower.split(':').rev().map(PathBuf::from).collect();
        }
        // A single layer is a bind mount of its snapshot.
        let inner = line.split(' ').nth(3).unwrap();
        let snapshots = "io.containerd.snapshotter.v1.overlayfs/snapshots";
        let number = inner.rsplit('/').nth(1).unwrap();
        vec![root.join(snapshots).join(number).join("fs")]
    }
}

impl Drop for Unpacked {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(self.target.path()).status();
        assert!(status.is_ok_and(|status| status.success()), "umount failed");
    }
}

/// One OCI layout with all of the images, as a tar.
fn oci_archive(images: &[(&str, &[Vec<u8>])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut written = std::collections::HashSet::new();
    let mut add = |path: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, path, bytes).unwrap();
    };
    let mut blob = |add: &mut dyn FnMut(&str, &[u8]), bytes: &[u8]| {
        let digest = format!("{:x}", Sha256::digest(bytes));
        if written.insert(digest.clone()) {
            add(&format!("blobs/sha256/{digest}"), bytes);
        }
        digest
    };
    let mut manifests = vec![];
    for (name, layers) in images {
        let digests: Vec<String> = layers.iter().map(|layer| blob(&mut add, layer)).collect();
        let quoted: Vec<String> = digests.iter().map(|d| format!("\"sha256:{d}\"")).collect();
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","config":{{}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            quoted.join(",")
        );
        let config_digest = blob(&mut add, config.as_bytes());
        let descriptors: Vec<String> = digests
            .iter()
            .zip(*layers)
            .map(|(digest, layer)| {
                format!(
                    r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:{digest}","size":{}}}"#,
                    layer.len()
                )
            })
            .collect();
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:{config_digest}","size":{}}},"layers":[{}]}}"#,
            config.len(),
            descriptors.join(",")
        );
        let digest = blob(&mut add, manifest.as_bytes());
        manifests.push(format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:{digest}","size":{},"platform":{{"architecture":"amd64","os":"linux"}},"annotations":{{"org.opencontainers.image.ref.name":"{name}"}}}}"#,
            manifest.len()
        ));
    }
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
        manifests.join(",")
    );
    add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    add("index.json", index.as_bytes());
    archive.into_inner().unwrap()
}
