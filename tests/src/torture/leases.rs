//! Converters on a real NFS: two clients (two mounts that share nothing) convert the
//! same layers at the same moment, one is killed now and then, and `gc` runs beside
//! them. What is published is complete and right; what is left over goes; what a living
//! converter works on stays.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::images;
use crate::Setting;
use crate::nfs::{Mode, Server};
use crate::random::Random;

/// Runs that many rounds.
///
/// # Errors
/// When anything is wrong.
pub fn run(setting: &Setting, rounds: u64) -> Result<()> {
    let scratch = setting.scratch_dir()?;
    let at = |name: &str| -> Result<PathBuf> {
        let path = scratch.path().join(name);
        fs::create_dir(&path)?;
        Ok(path)
    };
    let export = at("export")?;
    let clients = [at("client-0")?, at("client-1")?];
    let mut server = Server::start(&export)?;
    for client in &clients {
        server.mount(client, Mode::Hard)?;
    }
    let mkfs = setting.bin.join("mkfs-accel");
    let mut random = Random::new(rounds);
    let (mut killed, mut removed) = (0, 0);
    // How long a converter is left to work at most before it is killed, in milliseconds.
    let mut longest = 200;
    for round in 0..rounds {
        let layout = scratch.path().join("layout");
        let digest = images::write_image(&layout, 77, round, 6 << 20)?;
        let source = format!("oci:{}:it", layout.display());
        let convert = |client: &Path| start(&mkfs, &["convert", &source, "--ufs"], client);
        let mut one = convert(&clients[0])?;
        let other = convert(&clients[1])?;
        // One is killed in the middle of it, in every second round.
        if round % 2 == 1 {
            let part = format!(".{}.", one.id());
            let is_at_work = || -> Result<bool> {
                let leases = fs::read_dir(export.join("leases"));
                let mut names = leases.into_iter().flatten().flatten();
                Ok(names.any(|lease| lease.file_name().to_string_lossy().contains(&part)))
            };
            while !is_at_work()? && one.try_wait()?.is_none() {
                std::thread::sleep(Duration::from_millis(5));
            }
            std::thread::sleep(Duration::from_millis(random.below(longest)));
            match one.try_wait()? {
                None => killed += 1,
                // This machine is faster: earlier next time.
                Some(_) => longest = (longest / 2).max(1),
            }
            one.kill()?;
            one.wait()?;
        }
        let gc = start(
            &mkfs,
            &["gc", "--watch", "1", "--json", "--ufs"],
            &clients[(round % 2) as usize],
        )?;
        let said = finish("gc beside converters", gc)?;
        if round % 2 == 0 {
            finish("the first converter", one)?;
        }
        finish("the second converter", other)?;
        // Whoever was killed may have left something; now it is nobody's.
        let again = start(
            &mkfs,
            &["gc", "--watch", "1", "--json", "--ufs"],
            &clients[1],
        )?;
        let again = finish("gc afterwards", again)?;
        for said in [said, again] {
            let report: serde_json::Value = serde_json::from_str(&said)?;
            removed += report["removed"].as_array().map_or(0, Vec::len);
        }
        for name in ["tmp", "leases"] {
            let left: Vec<_> = fs::read_dir(export.join(name))?.flatten().collect();
            ensure!(left.is_empty(), "round {round}: left in {name}: {left:?}");
        }
        for client in &clients {
            let verify = start(&mkfs, &["verify", &digest, "--ufs"], client)?;
            finish("verify", verify)?;
        }
        fs::remove_dir_all(&layout)?;
    }
    // In one round nobody is killed.
    ensure!(
        rounds < 2 || (killed > 0 && removed > 0),
        "{killed} converters were killed at work and left {removed} files: nothing is tested"
    );
    println!(
        "leases: {rounds} rounds of two converters on NFS, {killed} killed at work, {removed} \
         leftovers removed by gc, everything published is right"
    );
    Ok(())
}

fn start(mkfs: &Path, words: &[&str], ufs: &Path) -> Result<Child> {
    Command::new(mkfs)
        .args(words)
        .arg(ufs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("running mkfs-accel")
}

fn finish(what: &str, child: Child) -> Result<String> {
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{what} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(String::from_utf8(output.stdout)?)
}
