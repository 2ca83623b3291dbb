//! What a Job of a cluster does with UFS, on a real NFS server that makes nobody of its clients'
//! root, with what the controller gives a Job and no more: a user and group of its own, no
//! capability, no way to get one, a root file system that nobody can write to.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::Setting;
use crate::nfs::{Mode, Server};
use crate::torture::images;

/// Whom Jobs run as unless they are told otherwise.
const USER: u32 = 65532;
/// UFS, or the output, cannot be used: mkfs-accel's exit code.
const STORAGE: i32 = 5;

/// Tries UFS, converts, verifies on another node, and deletes.
pub fn work_on_nfs(setting: &Setting) -> Result<()> {
    let scratch = setting.scratch_dir()?;
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o711))?;
    let at = |name: &str| -> Result<PathBuf> {
        let path = scratch.path().join(name);
        fs::create_dir(&path)?;
        Ok(path)
    };
    let export = at("export")?;
    let nodes = [at("node-0")?, at("node-1")?];
    let mut server = Server::start_squashing(&export)?;
    for node in &nodes {
        server.mount(node, Mode::Hard)?;
    }
    let node = nodes[0].display().to_string();
    let mkfs = setting.bin.join("mkfs-accel");
    let job = |words: &[&str]| as_a_job(scratch.path(), &mkfs, words);
    let check = ["check", "--json", "--ufs", &node];

    // The export is root's still, who is nobody to it.
    let tried = job(&check)?;
    ensure!(tried.status.code() == Some(STORAGE), "{tried:?}");
    let said = ufs_line(&tried)?;
    let error = said["error"].as_str().unwrap_or_default();
    ensure!(error.contains("Permission denied"), "{said}");
    chown(&export, Some(USER), Some(USER))?;
    let tried = Command::new(&mkfs).args(check).output()?;
    ensure!(tried.status.code() == Some(STORAGE), "as root: {tried:?}");
    let said = ufs_line(&tried)?;
    let error = said["error"].as_str().unwrap_or_default();
    ensure!(error.contains("root_squash"), "as root: {said}");
    let tried = ufs_line(&succeeded("check", job(&check)?)?)?;
    ensure!(tried["usable"] == true, "{tried}");

    let layout = scratch.path().join("layout");
    let digest = images::write_image(&layout, 5, 1, 6 << 20)?;
    let source = format!("oci:{}:it", layout.display());
    let claim = ["--claim", "cluster/task"];
    let convert = [
        &["convert", &source, "--ufs", &node][..],
        &claim,
        &["--json-lines"],
    ];
    succeeded("convert", job(&convert.concat())?)?;
    let owners = owners_below(&export)?;
    ensure!(owners == [USER], "what was made belongs to {owners:?}");
    let other = nodes[1].display().to_string();
    succeeded("verify", job(&["verify", &digest, "--ufs", &other])?)?;
    ensure!(layers(&export)? == 1, "not one layer is on UFS");

    let delete = [
        &["delete", "--ufs", &other][..],
        &claim,
        &["--settle", "1", "--json"],
    ];
    succeeded("delete", job(&delete.concat())?)?;
    ensure!(layers(&export)? == 0, "the layer is still on UFS");
    for name in ["tmp", "leases"] {
        let left = fs::read_dir(export.join(name))?.count();
        ensure!(left == 0, "{left} files are left in {name}");
    }
    Ok(())
}

/// Runs `mkfs-accel` with `words` as a Job's container does.
fn as_a_job(scratch: &Path, mkfs: &Path, words: &[&str]) -> Result<Output> {
    let inside = r#"
        mount -o remount,bind,ro /
        if touch "$1/written" 2>/dev/null; then echo "the root file system can be written to" >&2; exit 99; fi
        user=$2
        shift 2
        exec setpriv --reuid "$user" --regid "$user" --groups "$user" --inh-caps=-all \
            --bounding-set=-all --no-new-privs -- "$@"
    "#;
    Command::new("unshare")
        .args(["--mount", "--", "/bin/sh", "-euc", inside, "job"])
        .arg(scratch)
        .arg(USER.to_string())
        .arg(mkfs)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .context("running a Job")
}

fn succeeded(what: &str, output: Output) -> Result<Output> {
    ensure!(
        output.status.success(),
        "{what} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(output)
}

/// What `mkfs-accel check --json` says of UFS.
fn ufs_line(output: &Output) -> Result<Value> {
    let line = output.stdout.split(|byte| *byte == b'\n').next();
    let line = line.unwrap_or_default();
    let said: Value = serde_json::from_slice(line)
        .with_context(|| format!("no line of JSON: {}", String::from_utf8_lossy(line)))?;
    Ok(said["ufs"].clone())
}

/// Whose files and directories there are, each owner once.
fn owners_below(directory: &Path) -> Result<Vec<u32>> {
    let mut owners = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let found = entry.metadata()?;
        owners.push(found.uid());
        if found.is_dir() {
            owners.extend(owners_below(&entry.path())?);
        }
    }
    owners.sort_unstable();
    owners.dedup();
    Ok(owners)
}

fn layers(export: &Path) -> Result<usize> {
    let mut found = 0;
    for room in ["layers", "chains"] {
        let Ok(shards) = fs::read_dir(export.join(room).join("sha256")) else {
            continue;
        };
        for shard in shards {
            for file in fs::read_dir(shard?.path())? {
                let name = file?.file_name();
                found += usize::from(name.to_string_lossy().ends_with(".erofs"));
            }
        }
    }
    Ok(found)
}
