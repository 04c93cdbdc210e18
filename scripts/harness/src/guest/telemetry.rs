//! What telemetry says about real NICs.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use super::Boot;
use super::machine::{Nic, Role, need_mode};
use super::recover::pull;
use super::traffic::under_traffic;
use crate::case::{Cases, Context};
use crate::process::{PATIENCE, await_that};
use crate::telemetry::{Telemetry, socket_of};

pub(super) fn cases(cases: &mut Cases, boot: Boot, mode: &'static str) {
    for &nic in boot.nics() {
        cases
            .add(format!("telemetry of {}, {mode}", nic.name()), move |context| {
                told(context, boot, mode, nic)
            })
            .in_full_if(nic == Nic::E1000);
    }
}

fn told(context: &Context, boot: Boot, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let (l2fwd, pktgen) = under_traffic(context, mode, boot.generator_mode(), nic)?;
    let client = Telemetry::connect(&socket_of(Path::new("/var/run"), "fwd"), l2fwd.process.pid())?;
    let (info, vfio) = (client.ask("/ethdev/info,1")?, client.ask("/vfio/info,1")?);
    ensure!(info["name"] == nic.bdf(Role::FwdTx) && info["dev_started"] == 1, "{info}");
    ensure!(info["mac_addr"] == nic.mac(Role::FwdTx).to_uppercase(), "{info}");
    ensure!(vfio["mode"] == mode && vfio["address"] == info["name"], "{vfio}");
    let trace = client.ask("/vfio/trace")?;
    let calls = trace["calls"].as_array().context("no calls")?;
    ensure!(
        calls.iter().any(|call| call["call"] == "VFIO_DEVICE_BIND_IOMMUFD" && call["errno"].is_null()),
        "{trace}"
    );
    ensure!(client.ask("/vfio/trace,1")?["calls"][0] == calls[1], "the second call is not the first but one");
    let spaces = client.ask("/iommufd/ioas")?;
    ensure!(spaces[0]["ports"] == serde_json::json!([0, 1]), "{spaces}");
    let maps = client.ask(&format!("/iommufd/maps,{}", spaces[0]["id"]))?;
    ensure!(maps.as_array().is_some_and(|maps| spaces[0]["maps"] == maps.len()), "{maps}");
    ensure!(maps[0]["len"].as_u64().is_some_and(|len| len > 0), "{maps}");
    let link_is = |status| {
        await_that(&format!("that the link is {status}"), PATIENCE, || {
            client.ask("/ethdev/link_status,1").is_ok_and(|link| link["status"] == status)
        })
    };
    link_is("UP")?;
    let up = pull(nic, Role::FwdTx)?;
    link_is("DOWN")?;
    drop(up);
    link_is("UP")?;
    ensure!(client.number("/ethdev/xstats,1", "link_changes")? == 2, "not two changes of the link");
    ensure!(client.number("/ethdev/stats,0", "ipackets")? > 0, "no packets");
    pktgen.stop()?;
    l2fwd.stop_complaining(Signal::SIGINT)?;
    Ok(())
}
