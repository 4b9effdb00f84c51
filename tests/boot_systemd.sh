#!/bin/bash
# boot_systemd.sh -- a real systemd as PID 1 of namespaces of its own, on a machine whose PID 1 is something else.
#
#   boot_systemd.sh hold DIR [ro:SRC:DST | rw:SRC:DST]...   boot, print "ready", live until standard input ends
#   boot_systemd.sh exec DIR COMMAND [ARGUMENT]...          run a command inside, as root
#
# The root is made in memory: an overlay of this machine's /usr, an /etc and a /var from nothing, a network without
# interfaces, and SRC bound at DST. Only the units that a service needs are started (journal, D-Bus, tmpfiles, sysusers).
# Needs root, cgroup2, overlayfs; Debian's systemd, dbus, libnss-systemd, util-linux.
#
# Nothing stays behind, whatever dies: all mounts belong to the namespaces; these live as long as the process `hold` (its
# death kills unshare, whose death kills systemd), which ends with its standard input, so also when the test run is
# killed; a guard beside it removes the one cgroup and DIR when `hold` is gone; and the next `hold` removes the cgroups
# whose owner is dead.
set -euo pipefail
SELF=$(readlink -f "${BASH_SOURCE[0]}")
LIFE_SECONDS=3600

die() { echo "boot_systemd: $*" >&2; exit 1; }

cgroup2_root() { awk '$3 == "cgroup2" {print $2; exit}' /proc/mounts; }

remove_cgroup() {  # CGROUP: kill what is in it, then remove it from the leaves up
  [ -d "$1" ] || return 0
  echo 1 > "$1/cgroup.kill" 2>/dev/null || true
  for _ in {1..100}; do
    find "$1" -depth -type d -exec rmdir {} + 2>/dev/null || true
    [ -d "$1" ] || return 0
    sleep 0.05
  done
  echo "boot_systemd: cannot remove $1" >&2
}

guard() {  # DIR CGROUP: waits until the holder at the other end of standard input is gone
  trap '' INT TERM HUP
  cat > /dev/null
  remove_cgroup "$2"
  rm -rf --one-file-system "$1"
}

hold() {
  local dir=$1 cgroups cgroup unshare state stale; shift
  [ "$(id -u)" = 0 ] || die "needs root"
  cgroups=$(cgroup2_root); [ -n "$cgroups" ] || die "no cgroup2 file system is mounted"
  for stale in "$cgroups"/eternad-boot-*; do
    [ -d "/proc/${stale##*-}" ] || remove_cgroup "$stale"
  done
  cgroup=$cgroups/eternad-boot-$$
  mkdir -p "$dir/root"; mkdir "$cgroup"
  exec 9> >(exec setsid bash "$SELF" __guard "$dir" "$cgroup" 2>/dev/null)
  # Entering the cgroup before unshare makes it the root of the new cgroup namespace
  ( exec 9>&-; echo "$BASHPID" > "$cgroup/cgroup.procs"
    exec setpriv --pdeathsig KILL unshare --kill-child --mount --propagation private --pid --fork --uts --ipc --net --cgroup \
      bash "$SELF" __inside "$dir/root" "$@" ) > "$dir/console.log" 2>&1 < /dev/null &
  unshare=$!
  for _ in {1..300}; do
    kill -0 "$unshare" 2>/dev/null || { cat "$dir/console.log" >&2; die "the boot failed"; }
    [ -s "$dir/leader" ] || tr -d ' ' < "/proc/$unshare/task/$unshare/children" > "$dir/leader"
    state=$(enter "$dir" systemctl is-system-running 2>/dev/null) || true
    case $state in running|degraded) break;; esac
    sleep 0.1
  done
  case $state in running|degraded) echo ready;; *) cat "$dir/console.log" >&2; die "the boot hangs in state '$state'";; esac
  read -r -t "$LIFE_SECONDS" _ || true                       # until the end of standard input
  kill -s RTMIN+4 "$(cat "$dir/leader")" 2>/dev/null || true  # systemd(1): start poweroff.target
  for _ in {1..100}; do kill -0 "$unshare" 2>/dev/null || break; sleep 0.05; done
}                                                            # the guard does the rest

enter() {  # DIR COMMAND...: inside, with a clean environment
  local leader; leader=$(cat "$1/leader" 2>/dev/null) || die "not booted: $1"; shift
  nsenter -t "$leader" --mount --uts --ipc --net --pid --cgroup --root --wdns=/ -- env -i \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin LANG=C.UTF-8 HOME=/root SYSTEMD_PAGER=cat SYSTEMD_COLORS=0 "$@"
}

make_file_systems() {  # in the current directory, which becomes the root
  local node
  mkdir -p usr etc var run tmp dev proc sys root home opt srv boot .old .upper .work
  chmod 0700 root
  for node in bin sbin lib lib64; do ln -s "usr/$node" "$node"; done
  mount -t overlay overlay -o "lowerdir=/usr,upperdir=$PWD/.upper,workdir=$PWD/.work" usr
  mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs run
  mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs tmp
  mount -t proc -o nosuid,nodev,noexec proc proc
  mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
  mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
  mount -t tmpfs -o mode=0755,nosuid devices dev
  for node in null zero full random urandom tty; do touch dev/$node; mount --bind /dev/$node dev/$node; done
  touch dev/console; mount --bind /dev/null dev/console
  mkdir dev/pts dev/shm
  mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5,nosuid,noexec devpts dev/pts
  mount -t tmpfs -o mode=1777,nosuid,nodev shm dev/shm
  ln -s pts/ptmx dev/ptmx; ln -s /proc/self/fd dev/fd
  for node in proc/sys proc/sysrq-trigger; do               # kernel settings are this machine's
    if [ -e $node ]; then mount --bind $node $node; mount -o remount,bind,ro $node; fi
  done
}

make_configuration() {
  local units=usr/lib/systemd/system target unit
  cp -a /etc/ld.so.cache /etc/ld.so.conf /etc/ld.so.conf.d /etc/alternatives etc/
  ln -s ../usr/lib/os-release etc/os-release
  printf '%s: files systemd\n' passwd group shadow gshadow > etc/nsswitch.conf
  echo 'root:x:0:0:root:/root:/bin/bash' > etc/passwd
  echo 'root:x:0:' > etc/group
  echo eternad-boot > etc/hostname; echo '127.0.0.1 localhost eternad-boot' > etc/hosts
  ln -s /usr/share/zoneinfo/UTC etc/localtime
  systemd-id128 new > etc/machine-id
  mkdir -p etc/systemd/{system,journald.conf.d} var/{log/journal,lib,cache,tmp}
  chmod 1777 var/tmp
  ln -s /dev/null etc/systemd/system/systemd-journald-audit.socket  # the audit log is this machine's
  printf '[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\nForwardToConsole=no\n' > etc/systemd/journald.conf.d/boot.conf
  # Start nothing of this machine's hardware, consoles, timers or log-ins: clear what the targets pull in, name the rest
  rm -rf usr/lib/systemd/system-generators/*
  for target in sysinit sockets timers local-fs basic multi-user graphical; do rm -rf "$units/$target.target.wants"; done
  mkdir -p $units/{sysinit,sockets}.target.wants
  for unit in systemd-journald.service systemd-tmpfiles-setup.service systemd-sysusers.service; do
    ln -s ../$unit $units/sysinit.target.wants/; done
  for unit in systemd-journald.socket systemd-journald-dev-log.socket dbus.socket; do
    ln -s ../$unit $units/sockets.target.wants/; done
  ln -sf multi-user.target $units/default.target
}

bind() {  # ro:SRC:DST or rw:SRC:DST
  local mode source target
  IFS=: read -r mode source target <<< "$1"
  if [ -d "$source" ]; then mkdir -p ".$target"; else mkdir -p ".${target%/*}"; touch ".$target"; fi
  mount --rbind "$source" ".$target"
  [ "$mode" = rw ] || mount -o remount,bind,ro ".$target"
}

inside() {  # ROOT BIND...: PID 1 of the new namespaces; makes the root, then becomes systemd
  local root=$1 each; shift
  mount -t tmpfs -o mode=0755,size=2g eternad-boot "$root"
  cd "$root"
  make_file_systems
  make_configuration
  for each; do bind "$each"; done
  hostname eternad-boot
  pivot_root . .old; umount -l /.old; rmdir /.old
  mount --make-rshared /                                    # so that the services' mount namespaces follow it
  exec env -i PATH=/usr/sbin:/usr/bin container=eternad-boot \
    /usr/lib/systemd/systemd --log-target=journal --log-level=info --show-status=no
}

command=${1:-}; shift || true
case $command in
  hold) [ $# -ge 1 ] || die "hold: where?"; hold "$@";;
  exec) [ $# -ge 2 ] || die "exec: what?"; enter "$@";;
  __guard) guard "$@";;
  __inside) inside "$@";;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$SELF"; exit 2;;
esac
