//! Time for the packet path: the time stamp counter and the length of its ticks.

use std::sync::OnceLock;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// Returns the CPU time of the calling thread (`CLOCK_THREAD_CPUTIME_ID`), or 0 if the kernel does not report
/// it.
pub fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Returns the time of `CLOCK_MONOTONIC`, which is the same in all processes of a machine.
pub fn monotonic() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

/// Time stamp counter of the CPU or, on architectures other than `x86_64`, the kernel's raw clock in
/// nanoseconds.
///
/// The first call that needs the frequency of the counter determines it. If the counter is invariant and
/// CPUID reports a frequency that passes a short test, that frequency is used. Otherwise the counter is
/// compared with `CLOCK_MONOTONIC_RAW` for 2 ms. If the clock is slow to read, as in an emulator, the
/// comparison takes as long as needed for a precision of one part in a thousand, up to 64 ms.
#[derive(Clone, Copy, Debug)]
pub struct Tsc;

/// Where the frequency of the counter comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TscSource {
    /// CPUID leaf 0x40000010, from the hypervisor.
    Hypervisor,
    /// CPUID leaves 0x15 and 0x16, from the CPU.
    Cpuid,
    /// Measured against `CLOCK_MONOTONIC_RAW`.
    Measured,
    /// The counter is a kernel clock, in nanoseconds.
    Kernel,
}

#[derive(Clone, Copy, Debug)]
struct Frequency {
    hz: u64,
    /// Nanoseconds per tick, times 2^32. A division per packet would be expensive.
    nanos_per_tick: u64,
    source: TscSource,
}

impl Tsc {
    /// Reads the counter, in ticks. The read is not serializing.
    #[inline]
    pub fn now() -> u64 {
        counter()
    }

    /// Ticks per second.
    pub fn hz() -> u64 {
        frequency().hz
    }

    /// Source of [`hz`](Self::hz).
    pub fn source() -> TscSource {
        frequency().source
    }

    /// Converts `ticks` to nanoseconds, saturating at `u64::MAX`.
    #[inline]
    pub fn to_nanos(ticks: u64) -> u64 {
        let nanos = (u128::from(ticks) * u128::from(frequency().nanos_per_tick)) >> 32;
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }

    /// Converts `nanos` nanoseconds to ticks, saturating at `u64::MAX`.
    pub fn from_nanos(nanos: u64) -> u64 {
        let ticks = u128::from(nanos) * u128::from(frequency().hz) / u128::from(NANOS_PER_SECOND);
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }
}

fn frequency() -> &'static Frequency {
    static FREQUENCY: OnceLock<Frequency> = OnceLock::new();
    FREQUENCY.get_or_init(|| {
        let (hz, source) = find();
        let hz = hz.max(1);
        let nanos_per_tick = (u128::from(NANOS_PER_SECOND) << 32) / u128::from(hz);
        Frequency { hz, nanos_per_tick: u64::try_from(nanos_per_tick).unwrap_or(u64::MAX), source }
    })
}

#[cfg(any(miri, not(target_arch = "x86_64")))]
#[inline]
fn counter() -> u64 {
    raw_nanos()
}

#[cfg(any(miri, not(target_arch = "x86_64")))]
fn find() -> (u64, TscSource) {
    (NANOS_PER_SECOND, TscSource::Kernel)
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline]
fn counter() -> u64 {
    // SAFETY: Linux lets every process read the counter unless the process has disabled that (prctl
    // PR_SET_TSC).
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
fn find() -> (u64, TscSource) {
    const TEST_NANOS: u64 = 50_000;
    const WINDOW_NANOS: u64 = 2_000_000;
    let Some((hz, source)) = cpuid::frequency() else {
        return (measure(WINDOW_NANOS), TscSource::Measured);
    };
    // Hypervisors pass the CPU's own leaves on to guests even if they scale the guest's counter.
    let measured = measure(TEST_NANOS);
    if hz.abs_diff(measured) <= measured / 100 {
        (hz, source)
    } else {
        (measure(WINDOW_NANOS), TscSource::Measured)
    }
}

/// Reads `CLOCK_MONOTONIC_RAW`, which no NTP daemon slews, in nanoseconds.
fn raw_nanos() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC_RAW)
        .map_or(0, |time| time.tv_sec() as u64 * NANOS_PER_SECOND + time.tv_nsec() as u64)
}

/// A reading of both clocks.
#[derive(Clone, Copy)]
#[cfg(all(target_arch = "x86_64", not(miri)))]
struct Sample {
    nanos: u64,
    ticks: u64,
    /// Duration of the reading in nanoseconds, which bounds the error of `ticks`.
    blur: u64,
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
impl Sample {
    /// Returns the most precise of several readings: interrupts and preemption by the host spoil individual
    /// readings.
    fn take() -> Self {
        let read = |_| {
            let before = raw_nanos();
            let ticks = counter();
            let blur = raw_nanos().saturating_sub(before);
            Self { nanos: before + blur / 2, ticks, blur }
        };
        (1..16).map(read).fold(read(0), |best, next| if next.blur < best.blur { next } else { best })
    }
}

/// Measures ticks per second over a window of `nanos`, or a longer one if the readings are imprecise.
#[cfg(all(target_arch = "x86_64", not(miri)))]
fn measure(mut nanos: u64) -> u64 {
    const LONGEST: u64 = 64_000_000;
    let start = Sample::take();
    loop {
        while raw_nanos().saturating_sub(start.nanos) < nanos {
            std::hint::spin_loop();
        }
        let end = Sample::take();
        let elapsed = end.nanos.saturating_sub(start.nanos).max(1);
        if (start.blur + end.blur) * 1000 <= elapsed || nanos >= LONGEST {
            let ticks = u128::from(end.ticks.saturating_sub(start.ticks));
            return (ticks * u128::from(NANOS_PER_SECOND) / u128::from(elapsed)) as u64;
        }
        nanos *= 2;
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod cpuid {
    use core::arch::x86_64::{__cpuid as leaf, CpuidResult};

    use super::TscSource;

    const HYPERVISOR: u32 = 0x4000_0000;
    const HYPERVISOR_TIMING: u32 = 0x4000_0010;
    const EXTENDED: u32 = 0x8000_0000;
    const POWER_MANAGEMENT: u32 = 0x8000_0007;

    /// Frequency of the counter, if the counter is invariant and CPUID reports the frequency.
    pub(super) fn frequency() -> Option<(u64, TscSource)> {
        let invariant = leaf(EXTENDED).eax >= POWER_MANAGEMENT && leaf(POWER_MANAGEMENT).edx & 1 << 8 != 0;
        let guest = leaf(1).ecx & 1 << 31 != 0;
        if !invariant {
            return None;
        }
        if guest && leaf(HYPERVISOR).eax >= HYPERVISOR_TIMING {
            let khz = leaf(HYPERVISOR_TIMING).eax;
            if khz != 0 {
                return Some((u64::from(khz) * 1000, TscSource::Hypervisor));
            }
        }
        let most = leaf(0).eax;
        let ratio = (most >= 0x15).then(|| leaf(0x15))?;
        let base_mhz = if most >= 0x16 { leaf(0x16).eax & 0xffff } else { 0 };
        from_cpu(ratio, base_mhz).map(|hz| (hz, TscSource::Cpuid))
    }

    /// Computes the frequency from leaf 0x15: the ratio of counter (ebx) to crystal (eax), and the crystal's
    /// frequency (ecx). If ecx is 0, the counter runs at the base frequency of leaf 0x16.
    pub(super) fn from_cpu(ratio: CpuidResult, base_mhz: u32) -> Option<u64> {
        if ratio.eax == 0 || ratio.ebx == 0 {
            return None;
        }
        let hz = match ratio.ecx {
            0 => u64::from(base_mhz) * 1_000_000,
            crystal => {
                u64::try_from(u128::from(crystal) * u128::from(ratio.ebx) / u128::from(ratio.eax)).ok()?
            }
        };
        Some(hz).filter(|hz| *hz != 0)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn agrees_with_the_clock_of_the_kernel() {
        Tsc::hz();
        let (start, ticks) = (Instant::now(), Tsc::now());
        std::thread::sleep(Duration::from_millis(50));
        let (elapsed, nanos) = (start.elapsed().as_nanos() as u64, Tsc::to_nanos(Tsc::now() - ticks));
        assert!(
            elapsed.abs_diff(nanos) < elapsed / 50,
            "{elapsed} ns against {nanos} ns by {:?}",
            Tsc::source()
        );
    }

    #[test]
    fn the_ends_of_the_scale() {
        assert_eq!((Tsc::to_nanos(0), Tsc::from_nanos(0)), (0, 0));
        let second = Tsc::to_nanos(Tsc::hz());
        assert!(second.abs_diff(NANOS_PER_SECOND) <= 1, "{second}");
        assert_eq!(Tsc::from_nanos(NANOS_PER_SECOND), Tsc::hz());
        assert!(Tsc::from_nanos(u64::MAX) >= Tsc::from_nanos(NANOS_PER_SECOND));
        assert!(Tsc::to_nanos(u64::MAX) >= second);
    }

    #[cfg(all(target_arch = "x86_64", not(miri)))]
    #[test]
    fn what_cpuid_says() {
        let leaf = |eax, ebx, ecx| core::arch::x86_64::CpuidResult { eax, ebx, ecx, edx: 0 };
        assert_eq!(cpuid::from_cpu(leaf(2, 176, 24_000_000), 2100), Some(2_112_000_000));
        assert_eq!(cpuid::from_cpu(leaf(2, 176, 0), 2100), Some(2_100_000_000));
        assert_eq!(cpuid::from_cpu(leaf(2, 176, 0), 0), None);
        assert_eq!(cpuid::from_cpu(leaf(0, 0, 24_000_000), 2100), None);
        assert_eq!(
            cpuid::from_cpu(leaf(1, u32::MAX, u32::MAX), 0),
            Some(u64::from(u32::MAX) * u64::from(u32::MAX))
        );
        assert_eq!(cpuid::from_cpu(leaf(u32::MAX, 1, 1), 0), None);
    }

    proptest! {
        #[test]
        fn to_nanos_undoes_from_nanos(nanos in 0u64..(1 << 50)) {
            let back = Tsc::to_nanos(Tsc::from_nanos(nanos));
            // A tick may be longer than a nanosecond, and the factor has 32 fractional bits.
            let tick = NANOS_PER_SECOND / Tsc::hz() + 2;
            prop_assert!(nanos.abs_diff(back) <= tick + nanos / 100_000_000);
        }
    }
}
