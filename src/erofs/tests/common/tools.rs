//! What a test needs of the machine. With `ACCEL_TESTS_FULL=1` a missing need is
//! a failure; otherwise the test says what it lacks and passes.
#![allow(dead_code)] // each test program uses its part

use std::{
    path::{Path, PathBuf},
    process::Command,
};

pub fn missing<T>(what: &str) -> Option<T> {
    assert!(
        std::env::var("ACCEL_TESTS_FULL").as_deref() != Ok("1"),
        "{what}, and ACCEL_TESTS_FULL=1 wants every test to run"
    );
    eprintln!("not run: {what}");
    None
}

/// The newest fsck.erofs: `$ACCEL_FSCK_EROFS`, or what tools/lib fetches.
pub fn fsck() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("ACCEL_FSCK_EROFS") {
        return Some(path.into());
    }
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tools/lib/fetch-erofs-utils"
    );
    match Command::new(script).output() {
        Ok(output) if output.status.success() => {
            let path = String::from_utf8(output.stdout).expect("a path");
            Some(path.trim().into())
        }
        _ => missing("fsck.erofs could not be fetched (tools/lib/fetch-erofs-utils)"),
    }
}

/// Whether file systems can be mounted.
pub fn root() -> Option<()> {
    match rustix::process::geteuid().is_root() {
        true => Some(()),
        false => missing("mounting needs root"),
    }
}

/// Runs `fsck.erofs`, which must find nothing, extracting all data on the way.
pub fn check_with_fsck(fsck: &Path, image: &Path) {
    let output = Command::new(fsck).arg("--extract").arg(image).output();
    let output = output.expect("fsck.erofs starts");
    assert!(
        output.status.success(),
        "fsck.erofs: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// An image mounted by the kernel through a loop device, until dropped.
pub struct Mounted(pub tempfile::TempDir);

/// Mounts an image, or says that the kernel does not want it.
pub fn try_mount(image: &Path) -> Option<Mounted> {
    let dir = tempfile::tempdir().expect("a mount point");
    let output = Command::new("mount")
        .args(["-t", "erofs", "-o", "loop,ro"])
        .args([image, dir.path()])
        .output();
    let output = output.expect("mount starts");
    if !output.status.success() {
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        return None;
    }
    Some(Mounted(dir))
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(self.0.path()).status();
        assert!(status.is_ok_and(|status| status.success()), "umount failed");
    }
}
